"""
Between messages and tokens: what is shown of what a model writes.

in    tokens, as they come from the engine
out   TextStream (text that can be shown as it comes), text_of (a whole reply), printable
"""
import codecs
import unicodedata

from tokenizer import SPECIAL_TOKENS


class TextStream:
    """
    Tokens in, text out as soon as it is whole: never half a character, never a special token.

    A token may end inside a character of several bytes; those bytes wait for the next token.
    Bytes that are no UTF-8 become U+FFFD. A call of the calculator reads [12*7 = 84].
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.names = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.state = ""                # of the tool: "" "call" "called" "result"

    def feed(self, token):
        """The text that token completes; often its own, "" while a character is open."""
        name = self.names.get(token)
        if name is None:
            text = self.decoder.decode(self.tokenizer.decode_bytes([token]))
            # a call without a result ends where the text goes on
            return self.close() + text if self.state == "called" else text
        text = self.decoder.decode(b"", final=True)                # a special ends every character
        if name == "<|python_start|>":
            text, self.state = text + self.close() + "[", "call"
        elif name == "<|python_end|>" and self.state == "call":
            self.state = "called"
        elif name == "<|output_start|>" and self.state == "called":
            text, self.state = text + " = ", "result"
        elif name == "<|output_end|>" and self.state == "result":
            text += self.close()
        return text

    def flush(self):
        """What is still open when the reply is over."""
        return self.decoder.decode(b"", final=True) + self.close()

    def close(self):
        """End the brackets of a call, if there are any."""
        text, self.state = "]" if self.state else "", ""
        return text


def text_of(tokenizer, ids):
    """A whole reply as text, as TextStream shows it."""
    stream = TextStream(tokenizer)
    return "".join(stream.feed(token) for token in ids) + stream.flush()


def printable(text):
    """text with its newlines and tabs, without other control characters: they could repaint or rename a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
