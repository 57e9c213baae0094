//! Cuts text into chunks: words, numbers, runs of punctuation, runs of white space.
//!
//! BPE never merges across a chunk border, so this decides what a token can be at all. The rule is
//! written as a regular expression (`DEFAULT_PATTERN`) because that is how tokenizers are shared.
//! Running it as one is where other trainers spend 80 % of their time: a regex engine tries the
//! alternatives one after the other at every position. But the first character nearly decides which
//! alternative matches, so for this one pattern a hand-written scanner does the same job in a few
//! table look-ups per chunk. Every other pattern goes to the `fancy-regex` crate.
//!
//! Two things make the scanner short:
//! * a table says for each character what it is: letter, number, space, line break or other;
//! * the byte 0xFF, which valid UTF-8 never contains, follows every document and belongs to no
//!   class. So each run of characters ends there by itself, with no test for the end of the text.

use fancy_regex::{CompileError, Error, Regex};

// The two-level table of Unicode classes: BLOCK_OF and BLOCKS, written by build.rs.
mod unicode {
    include!(concat!(env!("OUT_DIR"), "/unicode.rs"));
}

/// The split pattern of GPT-4 with at most two digits per number instead of three.
///
/// Its alternatives, in the order in which they are tried:
/// 1. `'(?i:[sdmt]|ll|ve|re)`         an English contraction: 's 'd 'm 't 'll 've 're
/// 2. `[^\r\n\p{L}\p{N}]?+\p{L}+`     letters, with one space or symbol before them
/// 3. `\p{N}{1,2}`                    one or two digits
/// 4. ` ?[^\s\p{L}\p{N}]++[\r\n]*`    symbols, with one space before and line breaks after them
/// 5. `\s*[\r\n]`                     white space up to its last line break
/// 6. `\s+(?!\S)`                     white space, but not the last one before a word
/// 7. `\s+`                           a single white space that is left over
pub const DEFAULT_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// A chunk: where it starts and where it ends.
pub type Span = (usize, usize);

/// Chunks found before the caller sees them.
pub const GROUP: usize = 64;

/// What a character is, as far as the pattern can see. The first four numbers are build.rs's.
const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3; // white space except the two of NEWLINE
const NEWLINE: u8 = 4; // \r and \n, which the pattern treats apart
const STOP: u8 = 5; // the byte after a document
const WIDE: u8 = 6; // the first byte of a character of two to four bytes: look further

/// The byte after every document.
const END: u8 = 0xFF;

/// Bytes that may be read after the last END, so that the scanner can load 16 bytes at once
/// wherever it stands.
const PAD: usize = 16;

/// Bytes that an empty batch keeps at most.
const KEPT_BYTES: usize = 4 << 20;

/// The class of a byte on its own.
static BYTE_CLASS: [u8; 256] = {
    let mut table = [WIDE; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = unicode::BLOCKS[unicode::BLOCK_OF[0] as usize][byte];
        byte += 1;
    }
    table[b'\r' as usize] = NEWLINE;
    table[b'\n' as usize] = NEWLINE;
    table[END as usize] = STOP;
    table
};

/// Some documents, one after the other in memory, ready to be split.
pub struct Batch {
    text: Vec<u8>, // document END document END ... and PAD times END
    documents: usize,
}

impl Batch {
    pub fn new() -> Batch {
        Batch { text: vec![END; PAD], documents: 0 }
    }

    pub fn push(&mut self, document: &str) {
        self.text.truncate(self.text.len() - PAD);
        self.text.extend_from_slice(document.as_bytes());
        self.text.extend_from_slice(&[END; PAD + 1]);
        self.documents += 1;
    }

    /// Makes the batch empty. It keeps its memory for what comes next, but not that of a huge document.
    pub fn clear(&mut self) {
        self.text.clear();
        self.text.resize(PAD, END);
        self.text.shrink_to(KEPT_BYTES);
        self.documents = 0;
    }

    /// The bytes of all documents with what stands between them.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    #[cfg(test)]
    pub fn capacity(&self) -> usize {
        self.text.capacity()
    }

    pub fn documents(&self) -> usize {
        self.documents
    }
}

impl Default for Batch {
    fn default() -> Batch {
        Batch::new()
    }
}

/// A split pattern, ready to use.
#[derive(Clone)]
pub enum Splitter {
    /// The default pattern with numbers of at most this many digits, by the scanner below.
    Scanner { digits: usize },
    /// Any other pattern.
    Regex(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Splitter, String> {
        for digits in [2, 3] {
            if pattern == DEFAULT_PATTERN.replace("{1,2}", &format!("{{1,{digits}}}")) {
                return Ok(Splitter::Scanner { digits });
            }
        }
        match Regex::new(pattern) {
            Ok(regex) => Ok(Splitter::Regex(Box::new(regex))),
            Err(error) => Err(format!("the split pattern is not a valid regular expression: {}", reason(&error))),
        }
    }

    /// Finds all chunks of all documents, in order, and calls `group` with up to `GROUP` of them
    /// at a time. A chunk is its start and end in `batch.text()`. Stops when `group` returns false.
    ///
    /// In groups, because whoever looks chunks up in a large table can then start to fetch all of
    /// a group from memory before it needs the first.
    pub fn for_each_group(&self, batch: &Batch, mut group: impl FnMut(&[Span]) -> bool) -> Result<(), String> {
        let text = batch.text();
        let last = text.len() - PAD;
        let mut spans = [(0, 0); GROUP];
        let mut found = 0;
        let mut start = 0;
        match self {
            Splitter::Scanner { digits } => {
                while start < last {
                    if text[start] == END {
                        start += 1; // on to the next document
                        continue;
                    }
                    let end = next_chunk(text, start, *digits);
                    spans[found] = (start, end);
                    found += 1;
                    if found == GROUP {
                        if !group(&spans) {
                            return Ok(());
                        }
                        found = 0;
                    }
                    start = end;
                }
            }
            Splitter::Regex(regex) => {
                // text between two matches is in no chunk, as in tiktoken
                for document in text[..last].split(|&byte| byte == END) {
                    let document_text = std::str::from_utf8(document).map_err(|e| e.to_string())?;
                    for matched in regex.find_iter(document_text) {
                        let matched = matched.map_err(|e| format!("the split pattern failed on a text: {e}"))?;
                        if matched.start() == matched.end() {
                            continue; // a pattern may match nothing at all; that is no chunk
                        }
                        spans[found] = (start + matched.start(), start + matched.end());
                        found += 1;
                        if found == GROUP {
                            if !group(&spans) {
                                return Ok(());
                            }
                            found = 0;
                        }
                    }
                    start += document.len() + 1;
                }
            }
        }
        group(&spans[..found]);
        Ok(())
    }
}

/// What is wrong with a pattern, in one line.
fn reason(error: &Error) -> String {
    if let Error::CompileError(compile_error) = error {
        if let CompileError::InnerError(inner) = &**compile_error {
            // the engine inside draws the place over several lines; the last one has the reason
            let drawn = inner.syntax_error().map(|syntax| syntax.to_string()).unwrap_or_default();
            if let Some(last) = drawn.lines().last() {
                return last.trim_start_matches("error: ").to_string();
            }
        }
    }
    error.to_string()
}

/// The class of the character at `i`, and where the next one begins.
#[inline(always)]
fn class_at(text: &[u8], i: usize) -> (u8, usize) {
    let class = BYTE_CLASS[text[i] as usize];
    if class == WIDE {
        return wide_class_at(text, i);
    }
    (class, i + 1)
}

/// `class_at` for a character of two, three or four bytes: puts its code point together.
#[inline(never)]
fn wide_class_at(text: &[u8], i: usize) -> (u8, usize) {
    let low = |k: usize| (text[i + k] & 0x3f) as usize;
    let first = text[i] as usize;
    let (code, length) = if first < 0xe0 {
        ((first & 0x1f) << 6 | low(1), 2)
    } else if first < 0xf0 {
        ((first & 0x0f) << 12 | low(1) << 6 | low(2), 3)
    } else {
        ((first & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4)
    };
    let block = unicode::BLOCK_OF[code / 256] as usize;
    (unicode::BLOCKS[block][code % 256], i + length)
}

/// The end of the chunk that begins at `start`, where a character of some document stands.
#[inline(always)]
fn next_chunk(text: &[u8], start: usize, digits: usize) -> usize {
    let (class, second) = class_at(text, start);
    match class {
        LETTER => letters(text, second),
        SPACE => {
            let (next_class, third) = class_at(text, second);
            match next_class {
                LETTER => letters(text, third), // any space may stand before letters
                OTHER if text[start] == b' ' => symbols(text, third), // only a plain one before symbols
                _ => white_space(text, start),
            }
        }
        NEWLINE => white_space(text, start),
        NUMBER => numbers(text, second, digits - 1),
        _ => {
            // a symbol: part of a contraction, in front of letters, or the first of several
            if text[start] == b'\'' {
                if let Some(end) = contraction(text, second) {
                    return end;
                }
            }
            let (next_class, third) = class_at(text, second);
            if next_class == LETTER {
                return letters(text, third);
            }
            symbols(text, second)
        }
    }
}

/// The end of the run of letters that goes on at `i`.
///
/// Half of all bytes pass here, so ASCII letters are found eight at a time by arithmetic on one
/// 64-bit number. `| 0x20` makes capitals small. Then 0xe0 minus a byte has its top bit set if the
/// byte comes before 'a' (0x61), and a byte plus 0x05 if it comes after 'z' (0x7a). No sum or
/// difference reaches into the next byte. The first top bit that is set is the first non-letter.
#[inline(always)]
fn letters(text: &[u8], mut i: usize) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const TOP: u64 = 0x80 * ONES;
    loop {
        let Some(bytes) = text.get(i..i + 8) else { return i };
        let bytes = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let small = (bytes | (0x20 * ONES)) & !TOP;
        let before_a = 0xe0 * ONES - small;
        let after_z = small + 0x05 * ONES;
        let found = ((before_a | after_z | bytes) & TOP).trailing_zeros() as usize / 8;
        i += found;
        if found == 8 {
            continue;
        }
        if text[i] < 128 {
            return i;
        }
        // not ASCII: one letter by the table, then eight at a time again
        let (class, next) = class_at(text, i);
        if class != LETTER {
            return i;
        }
        i = next;
    }
}

/// The end of a number of which `more` digits may still follow.
#[inline(always)]
fn numbers(text: &[u8], mut i: usize, more: usize) -> usize {
    for _ in 0..more {
        let (class, next) = class_at(text, i);
        if class != NUMBER {
            break;
        }
        i = next;
    }
    i
}

/// The end of a run of symbols and of the line breaks after it.
#[inline(always)]
fn symbols(text: &[u8], mut i: usize) -> usize {
    loop {
        let (class, next) = class_at(text, i);
        if class != OTHER {
            break;
        }
        i = next;
    }
    while BYTE_CLASS[text[i] as usize] == NEWLINE {
        i += 1;
    }
    i
}

/// The end of the chunk of white space that begins at `start`: alternatives 5, 6 and 7.
#[inline(never)] // rare, and out of the way it leaves registers to the rest
fn white_space(text: &[u8], start: usize) -> usize {
    let mut after_newline = start;
    let mut before_last = start;
    let mut i = start;
    loop {
        let (class, next) = class_at(text, i);
        match class {
            NEWLINE => after_newline = next,
            SPACE => {}
            // the text ends here, so nothing follows that could want the last space
            STOP if after_newline == start => return i,
            _ => break,
        }
        before_last = i;
        i = next;
    }
    if after_newline > start {
        after_newline
    } else if before_last > start {
        before_last
    } else {
        i
    }
}

/// The end of the contraction whose letters begin at `i`, after the apostrophe, if it is one.
#[inline(always)]
fn contraction(text: &[u8], i: usize) -> Option<usize> {
    let second = text[i + 1] | 0x20;
    match (text[i] | 0x20, second) {
        (b's' | b'd' | b'm' | b't', _) => Some(i + 1),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(i + 2),
        // U+017F, the long s, is an s when case is ignored; its bytes are C5 BF
        _ if text[i..i + 2] == [0xc5, 0xbf] => Some(i + 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(pattern: &str, document: &str) -> Vec<String> {
        let mut batch = Batch::new();
        batch.push(document);
        let mut found = vec![];
        let splitter = Splitter::new(pattern).unwrap();
        let text = batch.text();
        splitter
            .for_each_group(&batch, |spans| {
                found.extend(spans.iter().map(|&(a, b)| String::from_utf8(text[a..b].to_vec()).unwrap()));
                true
            })
            .unwrap();
        found
    }

    // Adding an empty group changes nothing about a pattern but its text: the same rule, by regex.
    fn by_regex(pattern: &str) -> String {
        format!("(?:){pattern}")
    }

    #[test]
    fn default_pattern_on_a_sentence() {
        let expected = ["It", "'s", " ", "12", "34", " m", "'xs", " ...", "  ", " wide", "\n\n", " end"];
        assert_eq!(chunks(DEFAULT_PATTERN, "It's 1234 m'xs ...   wide\n\n end"), expected);
    }

    #[test]
    fn every_character_has_the_class_that_the_regex_crate_gives_it() {
        let all: String = ('\0'..=char::MAX).collect();
        let number_of = |class: u8| match class {
            LETTER => 141_028, // as in Unicode 16, which tiktoken uses too
            NUMBER => 1_911,
            _ => 25,
        };
        for (class, pattern) in [(LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")] {
            let regex = Regex::new(pattern).unwrap();
            let by_regex: Vec<&str> = regex.find_iter(&all).map(|found| found.unwrap().as_str()).collect();
            let of_class = |c: &char| {
                unicode::BLOCKS[unicode::BLOCK_OF[*c as usize / 256] as usize][*c as usize % 256] == class
            };
            let by_table: Vec<String> = all.chars().filter(of_class).map(String::from).collect();
            assert_eq!(by_regex, by_table, "{pattern}");
            assert_eq!(by_table.len(), number_of(class), "{pattern}");
        }
    }

    #[test]
    fn scanner_equals_regex_on_random_text() {
        let alphabet = [
            "a", "Z", "q", "s", "S", "t", "l", "L", "v", "e", "r", "R", "'", "'", "\u{17f}", "\u{212a}", "é", "я",
            "日", "\u{301}", "\u{10400}", "1", "2", "٣", "Ⅷ", "½", " ", " ", "\u{a0}", "\u{85}", "\u{2028}",
            "\u{3000}", "\t", "\n", "\r", "\r\n", "\0", ".", "-", "…", "🙂", "_", "{", "`", "@", "[", "\u{7f}",
            "abcdefgh",
        ];
        let mut state = 1u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for digits in ["{1,2}", "{1,3}"] {
            let pattern = DEFAULT_PATTERN.replace("{1,2}", digits);
            for _ in 0..4000 {
                let length = random(24);
                let text: String = (0..length).map(|_| alphabet[random(alphabet.len())]).collect();
                assert_eq!(chunks(&pattern, &text), chunks(&by_regex(&pattern), &text), "{text:?}");
            }
        }
    }

    #[test]
    fn long_runs_of_letters() {
        for length in [7, 8, 9, 15, 16, 57, 58, 1000] {
            let word = "x".repeat(length);
            assert_eq!(
                chunks(DEFAULT_PATTERN, &format!("{word}é {word}1")),
                [format!("{word}é"), format!(" {word}"), "1".into()]
            );
        }
    }

    #[test]
    fn chunks_end_with_their_document() {
        let mut batch = Batch::new();
        for document in ["ab", "", "cd ", "  "] {
            batch.push(document);
        }
        let mut found = vec![];
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        splitter
            .for_each_group(&batch, |spans| {
                found.extend(spans.iter().map(|&(a, b)| &batch.text()[a..b]));
                true
            })
            .unwrap();
        assert_eq!(found, [&b"ab"[..], b"cd", b" ", b"  "]);
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(Splitter::new("(").is_err_and(|e| e.contains("pattern")));
    }
}
