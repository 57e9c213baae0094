"""
Between messages and tokens: what a chat model is given to read, and what is shown of what it writes.

in    messages, {"role": "user", "content": "..."} as in the API that everybody speaks; tokens, as they come from the engine
out   prompt_of (a chat as tokens, its oldest turns left out where it is too long; else TooLong), TextStream (tokens as
      text that can be shown as it comes), text_of and reply_parts (a whole reply), content_of, StopStrings, printable
"""
import codecs
import unicodedata

from tokenizer import SPECIAL_TOKENS


class TooLong(ValueError):
    """A prompt that leaves no room in the context for an answer."""


def prompt_of(tokenizer, messages, context, max_tokens):
    """
    The ids up to and including <|assistant_start|>, and how many of the oldest turns were left out.

    A turn is a question and its answer. The oldest go, whole, until a quarter of the context (or max_tokens, if that is
    less) is left for the answer; half a turn would confuse the model. The system message stays.
    raises ValueError, one line, when the messages are not in order; TooLong when the last one alone is too long
    """
    system, turns = (messages[:1], messages[1:]) if messages and messages[0].get("role") == "system" else ([], messages)
    if not turns or turns[-1].get("role") != "user":
        raise ValueError("conversation: its last message must be from the user, for the assistant to reply to")
    room = context - min(max_tokens, context // 4)
    while len(ids := tokenizer.render_for_completion({"messages": system + turns})) > room and len(turns) > 1:
        over = len(ids) - room
        while over > 0 and len(turns) > 1:
            over -= len(tokenizer.render_conversation({"messages": turns[:2]})[0]) - 1     # each has a <|bos|>
            turns = turns[2:]
    if len(ids) >= context:
        raise TooLong(f"that is {len(ids)} tokens long and the context of this model holds {context}; say it shorter")
    return ids, (len(messages) - len(system) - len(turns)) // 2


class TextStream:
    """
    Tokens in, text out as soon as it is whole: never half a character, never a special token.

    A token may end inside a character of several bytes; those bytes wait for the next token.
    Bytes that are no UTF-8 become U+FFFD. A call of the calculator reads [12*7 = 84].

    brackets  False leaves "[", " = " and "]" out, for who shows the parts by other means
    kind      what the text fed last is: "text", "python" (a call) or "python_output" (its result)
    """

    def __init__(self, tokenizer, brackets=True):
        self.tokenizer = tokenizer
        self.marks = ("[", " = ", "]") if brackets else ("", "", "")
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
            text, self.state = text + self.close() + self.marks[0], "call"
        elif name == "<|python_end|>" and self.state == "call":
            self.state = "called"
        elif name == "<|output_start|>" and self.state == "called":
            text, self.state = text + self.marks[1], "result"
        elif name == "<|output_end|>" and self.state == "result":
            text += self.close()
        return text

    def flush(self):
        """What is still open when the reply is over."""
        return self.decoder.decode(b"", final=True) + self.close()

    def close(self):
        """End the brackets of a call, if there are any."""
        text, self.state = self.marks[2] if self.state else "", ""
        return text

    @property
    def kind(self):
        return {"call": "python", "result": "python_output"}.get(self.state, "text")


def text_of(tokenizer, ids):
    """A whole reply as text, as TextStream shows it."""
    stream = TextStream(tokenizer)
    return "".join(stream.feed(token) for token in ids) + stream.flush()


def reply_parts(tokenizer, ids):
    """A whole reply as a message's content, see content_of."""
    stream, pieces = TextStream(tokenizer, brackets=False), []
    for token in ids:
        text = stream.feed(token)
        pieces.append((stream.kind, text))             # after feed, which may change it
    return content_of([*pieces, ("text", stream.flush())])


def content_of(pieces):
    """(kind, text) pairs as a message's content: a text, or where the calculator was called a list of parts."""
    parts = []
    for kind, text in pieces:
        if text and parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": kind, "text": text})
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


class StopStrings:
    """
    Text goes through up to the first of some strings; what may be the beginning of one waits until it is known.

    found  True once one has come: nothing goes through any more
    """

    def __init__(self, strings):
        self.strings, self.held, self.found = [string for string in strings if string], "", False

    def feed(self, text):
        """The text that can be shown now."""
        if self.found:
            return ""
        self.held += text
        if places := [self.held.index(string) for string in self.strings if string in self.held]:
            self.found = True
            return self.held[:min(places)]
        waiting = max((n for string in self.strings for n in range(1, len(string)) if self.held.endswith(string[:n])),
                      default=0)
        text = self.held[:len(self.held) - waiting]
        self.held = self.held[len(text):]
        return text

    def flush(self):
        """What was held back, when the reply is over."""
        return "" if self.found else self.held


def printable(text):
    """text with its newlines and tabs, without other control characters: they could repaint or rename a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
