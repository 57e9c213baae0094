//! Turns text into token ids and back, with the ids that tiktoken gives for the same vocabulary.
//!
//! The rule for one chunk: start with its bytes; of all neighbouring pairs whose joined bytes are a
//! token, join the one with the smallest id, the leftmost of several; repeat until no pair is left.
//! That is the order in which training made the merges, applied to one chunk.
//!
//! Text repeats itself, so the rule is rarely needed: most chunks are a single token, and most of
//! the others came by before. Each worker therefore remembers the ids of the chunks it has seen, in
//! the same kind of table in which training counts them. tiktoken keeps no such memory and finds
//! the chunks by regular expression.

use crate::count::{FastMap, Key, Table};
use crate::split::{Batch, Splitter, GROUP};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;

/// A vocabulary and a split pattern. Never changes, so any number of threads can use it at once.
pub struct Encoder {
    pattern: String,
    splitter: Splitter,
    tokens: Vec<Box<[u8]>>,        // bytes of each token id
    bytes: [u32; 256],             // id of each single byte
    byte_pairs: Vec<[u32; 256]>,   // id of each two bytes, or NONE; the look-ups are many
    short: Table,                  // id of each token of at most 15 bytes
    long: FastMap<Box<[u8]>, u32>, // id of each longer token
    idle: Mutex<Vec<Worker>>,      // workers keep what they remember between calls
    most_idle: usize,
}

impl Encoder {
    /// The encoder with these tokens; the id of a token is its place in the list.
    pub fn new(pattern: &str, splitter: Splitter, tokens: Vec<Box<[u8]>>) -> Result<Encoder, String> {
        let mut bytes = [NONE; 256];
        let mut byte_pairs = vec![[NONE; 256]; 256];
        let mut short = Table::new();
        let mut long = FastMap::default();
        for (id, token) in tokens.iter().enumerate().rev() {
            // from the last to the first: of equal tokens the smallest id counts
            match token[..] {
                [] => return Err(format!("token {id} has no bytes")),
                [byte] => bytes[byte as usize] = id as u32,
                [first, second] => byte_pairs[first as usize][second as usize] = id as u32,
                _ => {}
            }
            match Key::of_slice(token) {
                Some(key) => *short.value(key, key.hash()) = id as u64,
                None => drop(long.insert(token.clone(), id as u32)),
            }
        }
        if let Some(byte) = bytes.iter().position(|&id| id == NONE) {
            return Err(format!("no token for the single byte {byte}: every byte needs one"));
        }
        let pattern = pattern.to_string();
        let idle = Mutex::new(vec![]);
        let most_idle = thread::available_parallelism().map_or(1, usize::from);
        Ok(Encoder { pattern, splitter, tokens, bytes, byte_pairs, short, long, idle, most_idle })
    }

    /// The tokens that a list of merges makes: 256 bytes, then one token per merge.
    pub fn tokens_of_merges(merges: &[(u32, u32)]) -> Vec<Box<[u8]>> {
        let mut tokens: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
        for &(left, right) in merges {
            tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat().into());
        }
        tokens
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// The id of the token `text[start..end]`, if it is one. Reads up to 16 bytes.
    #[inline(always)]
    fn id_at(&self, text: &[u8], start: usize, end: usize) -> Option<u32> {
        match Key::of(text, start, end) {
            Some(key) => self.short.get(key, key.hash()).map(|id| id as u32),
            None => self.long.get(&text[start..end]).copied(),
        }
    }

    /// Appends the ids of `document` to `ids`; not all of them if `stop` becomes true.
    pub fn encode(
        &self,
        document: &str,
        worker: &mut Worker,
        ids: &mut Vec<u32>,
        stop: &AtomicBool,
    ) -> Result<(), String> {
        let Worker { batch, memory, joiner } = worker;
        batch.push(document);
        let text = batch.text();
        let mut keys = [None; GROUP];
        let result = self.splitter.for_each_group(batch, |spans| {
            // first ask for the memories of the whole group, then use them
            for (key, &(start, end)) in keys.iter_mut().zip(spans) {
                *key = Key::of(text, start, end).map(|key| (key, key.hash()));
                if let Some((_, hash)) = key {
                    memory.short.prefetch(*hash);
                }
            }
            for (key, &(start, end)) in keys.iter().zip(spans) {
                let known = match *key {
                    Some((key, hash)) => memory.short.get(key, hash),
                    None => memory.long.get(&text[start..end]).copied(),
                };
                match known.map(|known| ((known >> 32) as usize, known as u32)) {
                    Some((1, id)) => ids.push(id),
                    Some((number, first)) => ids.extend_from_slice(&memory.ids[first as usize..][..number]),
                    None => {
                        let first = ids.len();
                        match self.id_at(text, start, end) {
                            Some(id) => ids.push(id), // most are a token as a whole
                            None => joiner.join(self, text, start, end, ids, stop),
                        }
                        if stop.load(Ordering::Relaxed) {
                            return false; // these may not be all ids of the chunk
                        }
                        memory.remember(&text[start..end], *key, &ids[first..]);
                    }
                }
            }
            !stop.load(Ordering::Relaxed)
        });
        batch.clear();
        result
    }

    /// The bytes of the tokens `ids`, one after the other.
    pub fn decode(&self, ids: &[i64]) -> Result<Vec<u8>, String> {
        let mut bytes = vec![];
        for &id in ids {
            match usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) {
                Some(token) => bytes.extend_from_slice(token),
                None => {
                    return Err(format!("unknown token id {id}: the vocabulary has {} tokens", self.tokens.len()))
                }
            }
        }
        Ok(bytes)
    }

    /// Calls `job` with a worker that no other thread is using. As many as there are cores are kept.
    pub fn with_worker<R>(&self, job: impl FnOnce(&mut Worker) -> R) -> R {
        let idle = self.idle.lock().map(|mut idle| idle.pop()).unwrap_or_default();
        let mut worker = idle.unwrap_or_default();
        let result = job(&mut worker);
        if let Ok(mut idle) = self.idle.lock() {
            if idle.len() < self.most_idle {
                idle.push(worker);
            }
        }
        result
    }

    /// The ids of many documents: all ids in a row, and the number of ids of each document.
    /// With `prepend`, every document begins with that id. Each thread encodes documents that
    /// follow one another, about the same number of bytes; this one those for which the system
    /// refuses a thread. Not all ids if `stop` becomes true.
    pub fn encode_batch<D: AsRef<str> + Sync>(
        &self,
        documents: &[D],
        prepend: Option<u32>,
        num_threads: usize,
        stop: &AtomicBool,
    ) -> Result<Vec<Part>, String> {
        let total: usize = documents.iter().map(|document| document.as_ref().len()).sum();
        // one group of documents per thread; below 64 kB a thread would cost more than it saves
        let share = (total / num_threads.max(1)).max(1 << 16);
        let mut groups: Vec<&[D]> = vec![];
        let (mut first, mut bytes) = (0, 0);
        for (i, document) in documents.iter().enumerate() {
            bytes += document.as_ref().len();
            if bytes >= share || i + 1 == documents.len() {
                groups.push(&documents[first..=i]);
                (first, bytes) = (i + 1, 0);
            }
        }
        let encode_group = |group: &[D]| {
            self.with_worker(|worker| {
                let mut part = Part::default();
                for document in group {
                    let first = part.ids.len();
                    part.ids.extend(prepend);
                    self.encode(document.as_ref(), worker, &mut part.ids, stop)?;
                    part.lengths.push(part.ids.len() - first);
                }
                Ok(part)
            })
        };
        if groups.len() < 2 {
            return groups.into_iter().map(encode_group).collect();
        }
        thread::scope(|scope| {
            let encode_group = &encode_group;
            let start = |group| (group, thread::Builder::new().spawn_scoped(scope, move || encode_group(group)));
            let threads: Vec<_> = groups.into_iter().map(start).collect();
            let broken = || Err("an encoding thread broke down".to_string());
            let result = |(group, thread): (_, io::Result<thread::ScopedJoinHandle<_>>)| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| broken()),
                Err(_) => encode_group(group),
            };
            threads.into_iter().map(result).collect()
        })
    }
}

/// What one thread of `encode_batch` made.
#[derive(Default)]
pub struct Part {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>, // ids per document
}

/// What a thread needs to encode: buffers, and the chunks it remembers.
#[derive(Default)]
pub struct Worker {
    batch: Batch,
    memory: Memory,
    joiner: Joiner,
}

/// The ids of chunks seen before: for each chunk how many ids it has and, in the lower 32 bits,
/// the only one or where they begin in `ids`.
#[derive(Default)]
struct Memory {
    short: Table,
    long: FastMap<Box<[u8]>, u64>,
    ids: Vec<u32>,
}

impl Memory {
    /// With so many chunks, about 20 MB, it is emptied. Fewer would be found in faster memory,
    /// but merging again is dearer.
    /// measured: 192k chunks 83 MB/s, 384k 99 MB/s on 100 MB of prose, server Xeon, 2026-11
    const CHUNKS: usize = 384 * 1024;

    /// With so many ids as well: unusual text, at most 16 MB of it.
    const IDS: usize = 4 << 20;

    /// Longer chunks are too rare to be remembered.
    const LONGEST: usize = 64;

    /// Stores the ids of a chunk; `key` is its key and hash if it is a short one.
    fn remember(&mut self, chunk: &[u8], key: Option<(Key, u64)>, chunk_ids: &[u32]) {
        if self.short.len() + self.long.len() == Memory::CHUNKS || self.ids.len() >= Memory::IDS {
            *self = Memory::default();
        }
        let value = match chunk_ids {
            [id] => 1 << 32 | *id as u64,
            _ => (chunk_ids.len() as u64) << 32 | self.ids.len() as u64,
        };
        match key {
            Some((key, hash)) => *self.short.value(key, hash) = value,
            None if chunk.len() > Memory::LONGEST => return,
            None => drop(self.long.insert(chunk.into(), value)),
        }
        if chunk_ids.len() > 1 {
            self.ids.extend_from_slice(chunk_ids);
        }
    }
}

/// Applies the rule to one chunk. A part of the chunk is named by the byte at which it begins.
#[derive(Default)]
struct Joiner {
    parts: Vec<Joint>,
    queue: BinaryHeap<Reverse<u64>>, // the joined ids that are possible: id << 32 | left part
}

/// One part of a chunk, and what it would become with the part after it.
struct Joint {
    id: u32,
    joined: u32, // id of both together, or NONE
    before: u32, // the part on the left, or NONE
    next: u32,   // the part on the right: where this one ends
}

const NONE: u32 = u32::MAX;

impl Joiner {
    /// Parts and joined ids that are kept room for; more only while a huge chunk needs it.
    const KEPT: usize = 1 << 16;

    /// Appends the ids of the chunk `text[start..end]` to `ids`. With a queue, not a search for the
    /// smallest id at every step, because a chunk can be a million letters long.
    fn join(
        &mut self,
        encoder: &Encoder,
        text: &[u8],
        start: usize,
        end: usize,
        ids: &mut Vec<u32>,
        stop: &AtomicBool,
    ) {
        let Joiner { parts, queue } = self;
        let stopped = || stop.load(Ordering::Relaxed); // each loop can take seconds
                                                       // every byte is a part
        for (i, &byte) in text[start..end].iter().enumerate() {
            if stopped() {
                break;
            }
            let joined = match start + i + 1 < end {
                true => encoder.byte_pairs[byte as usize][text[start + i + 1] as usize],
                false => NONE,
            };
            if joined != NONE {
                queue.push(Reverse((joined as u64) << 32 | i as u64));
            }
            let i = i as u32;
            let id = encoder.bytes[byte as usize];
            let before = i.wrapping_sub(1); // 0 - 1 is NONE
            parts.push(Joint { id, joined, before, next: i + 1 });
        }
        let length = parts.len();
        // ids and then places come out of the queue in rising order: smallest id, leftmost place
        while let (Some(Reverse(top)), false) = (queue.pop(), stopped()) {
            let (id, left) = ((top >> 32) as u32, top as u32 as usize);
            if parts[left].joined != id {
                continue; // out of date: one of the two parts has changed
            }
            let right = parts[left].next as usize;
            let next = parts[right].next as usize;
            parts[right].joined = NONE;
            parts[left].id = id;
            parts[left].next = next as u32;
            if next < length {
                parts[next].before = left as u32;
            }
            // the new part may be joined with the one on its right and the one on its left
            for part in [left, parts[left].before as usize] {
                if part >= length {
                    continue; // there is no part on the left
                }
                let neighbour = parts[part].next as usize;
                let mut joined = NONE;
                if neighbour < length {
                    let both_end = parts[neighbour].next as usize;
                    joined = encoder.id_at(text, start + part, start + both_end).unwrap_or(NONE);
                }
                parts[part].joined = joined;
                if joined != NONE {
                    queue.push(Reverse((joined as u64) << 32 | part as u64));
                }
            }
        }
        // what is left, from left to right
        let mut part = 0;
        while part < length && !stopped() {
            ids.push(parts[part].id);
            part = parts[part].next as usize;
        }
        parts.clear();
        parts.shrink_to(Joiner::KEPT);
        queue.clear();
        queue.shrink_to(Joiner::KEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;

    fn encoder(merges: &[(u32, u32)]) -> Encoder {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        Encoder::new(DEFAULT_PATTERN, splitter, Encoder::tokens_of_merges(merges)).unwrap()
    }

    fn ids(encoder: &Encoder, text: &str) -> Vec<u32> {
        let mut ids = vec![];
        encoder.with_worker(|worker| encoder.encode(text, worker, &mut ids, &AtomicBool::new(false))).unwrap();
        ids
    }

    #[test]
    fn merges_in_the_order_of_their_ids() {
        let encoder = encoder(&[(98, 99), (97, 98), (256, 100)]); // bc, ab, bcd
        assert_eq!(ids(&encoder, "abcd"), [97, 258]);
        assert_eq!(ids(&encoder, "abab bc"), [257, 257, 32, 256]);
        assert!(ids(&encoder, "").is_empty());
        assert_eq!(encoder.decode(&[97, 258, 32]).unwrap(), b"abcd ");
        assert!(encoder.decode(&[259]).is_err());
    }

    #[test]
    fn long_chunks_and_a_second_time() {
        let encoder = encoder(&[(97, 97), (256, 256), (257, 257), (258, 258), (259, 259)]);
        let text = "a".repeat(1_000_003);
        let expected: Vec<u32> = std::iter::repeat_n(260, 1_000_003 / 32).chain([256, 97]).collect();
        assert_eq!(ids(&encoder, &text), expected);
        assert_eq!(ids(&encoder, &text), expected);
        assert_eq!(ids(&encoder, "aaa aaa"), ids(&encoder, "aaa aaa"));
    }

    #[test]
    fn what_a_huge_chunk_needed_is_not_kept() {
        let encoder = encoder(&[(97, 97)]);
        let run = "a".repeat(8 << 20);
        assert_eq!(ids(&encoder, &run).len(), 4 << 20);
        let worker = encoder.idle.lock().unwrap().pop().unwrap();
        assert!(worker.batch.capacity() <= 4 << 20);
        assert!(worker.joiner.parts.capacity() <= Joiner::KEPT && worker.joiner.queue.capacity() <= Joiner::KEPT);
        // nor are all ids of unusual text
        let mut memory = Memory::default();
        for i in 0..200_000u32 {
            let chunk = i.to_le_bytes();
            memory.remember(&chunk, Key::of_slice(&chunk).map(|key| (key, key.hash())), &[7; 64]);
        }
        assert!(memory.ids.len() <= Memory::IDS + 64);
    }

    #[test]
    fn idle_workers_are_as_many_as_cores_at_most() {
        fn nest(encoder: &Encoder, depth: usize) {
            if depth > 0 {
                encoder.with_worker(|_| nest(encoder, depth - 1));
            }
        }
        let encoder = encoder(&[]);
        nest(&encoder, encoder.most_idle + 3);
        assert_eq!(encoder.idle.lock().unwrap().len(), encoder.most_idle);
    }

    #[test]
    fn a_stopped_encoder_forgets_what_it_had_not_finished() {
        let encoder = encoder(&[(97, 98)]);
        let mut some = vec![];
        encoder.with_worker(|worker| encoder.encode("abcab", worker, &mut some, &AtomicBool::new(true))).unwrap();
        assert_eq!(ids(&encoder, "abcab"), [256, 99, 256]);
    }

    #[test]
    fn threads_do_not_change_the_ids() {
        let encoder = encoder(&[(97, 98), (256, 99)]);
        let documents: Vec<String> = (0..5000).map(|i| "abc ab ".repeat(i % 50)).collect();
        let flat = |num_threads| {
            let parts = encoder.encode_batch(&documents, Some(7), num_threads, &AtomicBool::new(false)).unwrap();
            let ids: Vec<u32> = parts.iter().flat_map(|part| part.ids.clone()).collect();
            let lengths: Vec<usize> = parts.iter().flat_map(|part| part.lengths.clone()).collect();
            (ids, lengths)
        };
        assert_eq!(flat(1), flat(4));
        assert_eq!(flat(1).1.len(), 5000);
    }

    #[test]
    fn a_vocabulary_without_some_byte_is_an_error() {
        let tokens = Encoder::tokens_of_merges(&[])[..255].to_vec();
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        assert!(Encoder::new(DEFAULT_PATTERN, splitter, tokens).is_err_and(|e| e.contains("255")));
    }
}
