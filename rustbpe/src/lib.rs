//! A byte-level BPE tokenizer: training and encoding.
//!
//! Training reads text and learns merges; encoding applies them. In reading order:
//!
//! | file | does |
//! |---|---|
//! | `split.rs` | cuts text into chunks; tokens never cross a chunk border |
//! | `count.rs` | counts the distinct chunks of a large text, on several threads |
//! | `merge.rs` | learns from these counts which tokens to join, the core of BPE |
//! | `encode.rs` | turns text into token ids with what was learned, and back |
//! | `python.rs` | the Python module: feeds documents in, turns mistakes into exceptions |
//!
//! All but `python.rs` know nothing of Python, so `cargo test` needs no Python to be there.
//! README.md explains the algorithm with an example.

pub mod count;
pub mod encode;
pub mod merge;
pub mod split;

#[cfg(feature = "extension-module")]
mod python;
