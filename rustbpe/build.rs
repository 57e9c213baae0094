//! Writes the Unicode table that src/split.rs reads: for every code point, is it a letter (\p{L}),
//! a number (\p{N}), white space (\s), or something else?
//!
//! The ranges come from `regex-syntax`, the crate that fancy-regex and tiktoken use for the same
//! classes. So the hand-written splitter and a regular expression can not disagree about a
//! character, and a newer Unicode version arrives by updating one line of Cargo.lock.
//!
//! A flat table would take 1.1 MB. Most blocks of 256 code points look like another block (all
//! Chinese characters, all unassigned, ...), so the table has two levels: the number of the block,
//! and the distinct blocks.

use regex_syntax::hir::{Class, HirKind};
use std::{env, fs, path::Path};

// The numbers are those of src/split.rs, which checks them against this file in its tests.
const CLASSES: [(&str, u8); 3] = [(r"\p{L}", 1), (r"\p{N}", 2), (r"\s", 3)];
const CODE_POINTS: usize = 0x110000;
const BLOCK: usize = 256;

fn main() {
    let mut class_of = vec![0u8; CODE_POINTS];
    for (pattern, class) in CLASSES {
        let parsed = regex_syntax::parse(pattern).expect("a class every version knows");
        let HirKind::Class(Class::Unicode(ranges)) = parsed.into_kind() else {
            panic!("{pattern} is not a character class");
        };
        for range in ranges.iter() {
            class_of[range.start() as usize..=range.end() as usize].fill(class);
        }
    }

    let mut blocks: Vec<&[u8]> = vec![];
    let mut block_of: Vec<u8> = vec![];
    for block in class_of.chunks(BLOCK) {
        let number = blocks.iter().position(|&b| b == block).unwrap_or_else(|| {
            blocks.push(block);
            blocks.len() - 1
        });
        block_of.push(u8::try_from(number).expect("at most 256 distinct blocks"));
    }

    let source = format!(
        "pub static BLOCK_OF: [u8; {}] = {:?};\npub static BLOCKS: [[u8; {}]; {}] = {:?};\n",
        block_of.len(),
        block_of,
        BLOCK,
        blocks.len(),
        blocks
    );
    let folder = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&folder).join("unicode.rs"), source).expect("OUT_DIR can be written");
    println!("cargo:rerun-if-changed=build.rs");
}
