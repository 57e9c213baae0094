//! Learns the merges from the distinct chunks ("words") and their counts.
//!
//! The rule of BPE: find the pair of neighbouring tokens that occurs most often, give it the next
//! free id, replace it everywhere, repeat. Equal counts: the pair with the smaller left id, then
//! with the smaller right id. Done literally, each of 65,000 steps would read all words again. Here
//! a step costs only the places where its pair occurs:
//!
//! * **Places.** Each pair that can still be chosen keeps the list of places where it begins. A
//!   merge visits its list and nothing else. A place can be out of date, when another merge has
//!   used up one of the two tokens; the visit sees that and passes on.
//! * **Words.** All words lie in one array with one slot per byte. A token writes its id into the
//!   slots of its first and of its last byte. So the token to the right of a place begins `length`
//!   slots on, and the slot just left of a place names the token that ends there: both neighbours
//!   without links, and a merge writes three slots.
//! * **Counts.** A merge of (a, b) only changes the counts of pairs that touch it: of x before it
//!   and of y after it. The changes are added up per neighbour first, so that the hash map is asked
//!   once per neighbour and not once per place.
//! * **Floor.** Most pairs are too rare ever to be chosen, and are not stored at all. See `floor`.
//! * **Queue.** Counts only ever fall once a pair exists, so a queued count may be too high but
//!   never too low: a pair that comes to the top with an old count is queued again with the present
//!   one. Only the pairs that are next in line are kept in order (a heap, small enough for the
//!   processor's cache); the others wait in one plain list per count.

use crate::count::{prefetch, Counter, FastMap};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// One byte of one word.
#[derive(Clone, Copy)]
struct Slot {
    id: u32,    // the token that begins or ends here, or one of the two numbers below
    count: u32, // how often the word occurs; beside the id, so that a visit finds both at once
}

const BORDER: u32 = u32::MAX; // not a byte: stands before, between and after words
const USED: u32 = u32::MAX - 1; // a token began here and is now the inside of a longer one

/// The distinct chunks of a text and how often each occurs.
pub struct Words {
    slots: Vec<Slot>,
    counts: Vec<u64>,
}

impl Words {
    pub fn new() -> Words {
        Words { slots: vec![Slot { id: BORDER, count: 0 }], counts: vec![] }
    }

    pub fn push(&mut self, word: &[u8], count: u64) {
        if word.len() < 2 || count == 0 {
            return; // nothing to merge
        }
        self.counts.push(count);
        // A count that does not fit into 32 bits is stored as the same word several times.
        let mut left = count;
        while left > 0 {
            let part = left.min(u32::MAX as u64) as u32;
            self.slots.extend(word.iter().map(|&byte| Slot { id: byte as u32, count: part }));
            self.slots.push(Slot { id: BORDER, count: 0 });
            left -= part as u64;
        }
    }

    /// A count below which no pair can be among the first `num_merges` merges.
    ///
    /// Take any count f. Once no pair occurs f times or more, each word that occurs f times or more
    /// is a single token (if not, its first two tokens would be such a pair), and different words
    /// are different tokens. So the merges with a count of at least f are at least as many as the
    /// words with a count of at least f. Let f be the count of the word at place `num_merges` when
    /// words are sorted by count: then the first `num_merges` merges all have a count of f or more.
    fn floor(&mut self, num_merges: usize) -> i64 {
        if num_merges == 0 || self.counts.len() < num_merges {
            return 1;
        }
        let (_, count, _) = self.counts.select_nth_unstable_by_key(num_merges - 1, |&count| Reverse(count));
        *count as i64
    }
}

impl From<Counter> for Words {
    fn from(counter: Counter) -> Words {
        let mut num_slots = 1;
        counter.for_each_word(|word, _| num_slots += word.len() + 1);
        let mut words = Words::new();
        words.slots.reserve_exact(num_slots); // growing by doubling would take twice the memory
        counter.for_each_word(|word, count| words.push(word, count));
        words
    }
}

impl Default for Words {
    fn default() -> Words {
        Words::new()
    }
}

/// A pair of ids as one number, ordered like the pair.
fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}

/// The waiting list for a count: one for each count below 4096, above that one for all counts with
/// as many bits. A higher list has higher counts.
fn level(count: i64) -> usize {
    match count < 4096 {
        true => count as usize,
        false => 4096 + (count.ilog2() - 12) as usize,
    }
}

/// The pairs that can still be chosen. What belongs to one pair has the same index in each list.
#[derive(Default)]
struct Pairs {
    index: FastMap<u64, u32>, // pair -> index; also of pairs that are done with, which harms nobody
    count: Vec<i64>,
    places: Vec<Vec<u32>>,
    top: BinaryHeap<(i64, Reverse<u64>, u32)>, // next in line: count when queued, pair, index
    below: Vec<Vec<(u64, u32)>>,               // waiting, by `level`: pair, index
}

impl Pairs {
    fn insert(&mut self, key: u64, count: i64, num_places: u32) -> u32 {
        let new = self.count.len() as u32;
        self.index.insert(key, new);
        self.count.push(count);
        self.places.push(Vec::with_capacity(num_places as usize));
        self.queue(key, count, new);
        new
    }

    fn queue(&mut self, key: u64, count: i64, pair: u32) {
        match self.below.get_mut(level(count)) {
            Some(waiting) => waiting.push((key, pair)),
            None => self.top.push((count, Reverse(key), pair)), // of the levels that have come up
        }
    }

    fn subtract(&mut self, key: u64, count: i64) {
        // not there: too rare from the beginning
        if let Some(&pair) = self.index.get(&key) {
            self.count[pair as usize] -= count;
        }
    }

    /// Takes the next pair to be merged out of the structure: (key, its places).
    fn pop(&mut self, floor: i64) -> Option<(u64, Vec<u32>)> {
        loop {
            match self.top.pop() {
                Some((queued, Reverse(key), pair)) if queued == self.count[pair as usize] => {
                    return Some((key, std::mem::take(&mut self.places[pair as usize])));
                }
                Some((_, Reverse(key), pair)) => self.queue_again(key, pair, floor),
                None => {
                    // the next lower level comes up
                    for (key, pair) in self.below.pop()? {
                        self.queue_again(key, pair, floor);
                    }
                }
            }
        }
    }

    /// Puts a pair back with its present count, or forgets it if that is now below the floor.
    fn queue_again(&mut self, key: u64, pair: u32, floor: i64) {
        let count = self.count[pair as usize];
        if count >= floor {
            self.queue(key, count, pair);
        } else {
            self.places[pair as usize] = vec![];
        }
    }
}

const NONE: u32 = u32::MAX;

/// What stands on one side of the merged places, added up per neighbouring token.
#[derive(Default)]
struct Neighbours {
    sum: Vec<(i64, u32)>, // for each token id: count and number of places
    pair: Vec<u32>,       // for each token id: index of the new pair with it, or NONE
    seen: Vec<u32>,       // the ids for which sum is not zero
}

impl Neighbours {
    fn grow(&mut self, num_tokens: usize) {
        self.sum.resize(num_tokens, (0, 0));
        self.pair.resize(num_tokens, NONE);
    }

    #[inline(always)]
    fn add(&mut self, id: u32, count: i64) {
        let sum = &mut self.sum[id as usize];
        if sum.1 == 0 {
            self.seen.push(id);
        }
        sum.0 += count;
        sum.1 += 1;
    }

    fn clear(&mut self) {
        for id in self.seen.drain(..) {
            self.sum[id as usize] = (0, 0);
            self.pair[id as usize] = NONE;
        }
    }
}

/// A place where the pair was merged, with the tokens before and after it.
struct Site {
    place: u32,
    before: u32,
    after: u32,
}

/// Learns up to `num_merges` merges: pair number i becomes token 256 + i. Fewer if the words run
/// out of pairs. Calls `go_on(merges so far)` now and then; None if that returned false.
pub fn learn(
    mut words: Words,
    num_merges: usize,
    mut go_on: impl FnMut(usize) -> bool,
) -> Result<Option<Vec<(u32, u32)>>, String> {
    let num_slots = words.slots.len();
    if num_slots >= USED as usize {
        return Err(format!("{num_slots} bytes of distinct chunks are more than 32-bit places can tell apart"));
    }
    // the sums for the first merge alone take seconds where there are ten million words
    if !go_on(0) {
        return Ok(None);
    }
    let floor = words.floor(num_merges);
    let mut learner = Learner::new(words.slots, floor);
    let mut merges = vec![];
    let mut work = 0;
    while merges.len() < num_merges {
        let Some((key, places)) = learner.pairs.pop(floor) else { break };
        let (a, b) = ((key >> 32) as u32, key as u32);
        merges.push((a, b));
        learner.merge(a, b, &places);
        // by work done, not by merges: the first merges have a million places, the last ones few
        work += places.len() + 100;
        if work > 1_000_000 {
            work = 0;
            if !go_on(merges.len()) {
                return Ok(None);
            }
        }
    }
    Ok(Some(merges))
}

/// Everything that changes while merges are learned.
struct Learner {
    slots: Vec<Slot>,
    length: Vec<u32>, // bytes of each token
    pairs: Pairs,
    floor: i64,
    // About the merge that is being made:
    sites: Vec<Site>,
    before: Neighbours,
    after: Neighbours,
    doubled: (i64, u32), // the new token next to itself: count and number of places
}

impl Learner {
    fn new(slots: Vec<Slot>, floor: i64) -> Learner {
        Learner {
            pairs: byte_pairs(&slots, floor),
            slots,
            length: vec![1; 256],
            floor,
            sites: vec![],
            before: Neighbours::default(),
            after: Neighbours::default(),
            doubled: (0, 0),
        }
    }

    /// Makes one new token of (a, b) wherever it occurs.
    fn merge(&mut self, a: u32, b: u32, places: &[u32]) {
        let id = self.length.len() as u32;
        self.length.push(self.length[a as usize] + self.length[b as usize]);
        self.before.grow(self.length.len());
        self.after.grow(self.length.len());
        self.doubled = (0, 0);
        self.visit(a, b, id, places);
        self.update_pairs(a, b, id);
        self.list_places();
        self.before.clear();
        self.after.clear();
    }

    /// Writes the new token into the words and adds up its neighbours.
    fn visit(&mut self, a: u32, b: u32, id: u32, places: &[u32]) {
        let (length_a, length_b) = (self.length[a as usize] as usize, self.length[b as usize] as usize);
        let slots = &mut self.slots[..];
        for (i, &place) in places.iter().enumerate() {
            // the places are all over memory, so fetch some visits ahead
            if let Some(&ahead) = places.get(i + 16) {
                prefetch(slots, ahead as usize);
            }
            let left = place as usize;
            let right = left + length_a;
            if slots[left].id != a || slots[right].id != b {
                continue; // out of date
            }
            let count = slots[left].count as i64;
            let site = Site { place, before: slots[left - 1].id, after: slots[right + length_b].id };
            slots[right].id = USED;
            slots[left].id = id;
            slots[right + length_b - 1].id = id;
            if site.before == id {
                // "abab": when the token before was merged, it still had an a after it and counted
                // as (id, a); now it is (id, id)
                self.doubled.0 += count;
                self.doubled.1 += 1;
            } else if site.before != BORDER {
                self.before.add(site.before, count);
            }
            if site.after != BORDER {
                self.after.add(site.after, count);
            }
            self.sites.push(site);
        }
    }

    /// Takes the counts away from the pairs that were there before, (x, a) and (b, y), and enters
    /// the new pairs, (x, id), (id, y) and (id, id), if they can ever be chosen.
    fn update_pairs(&mut self, a: u32, b: u32, id: u32) {
        for &x in &self.before.seen {
            let (count, num_places) = self.before.sum[x as usize];
            self.pairs.subtract(pair_key(x, a), count);
            if count >= self.floor {
                self.before.pair[x as usize] = self.pairs.insert(pair_key(x, id), count, num_places);
            }
        }
        for &y in &self.after.seen {
            let (mut count, num_places) = self.after.sum[y as usize];
            self.pairs.subtract(pair_key(b, y), count);
            if y == a {
                count -= self.doubled.0;
            }
            if count >= self.floor {
                self.after.pair[y as usize] = self.pairs.insert(pair_key(id, y), count, num_places);
            }
        }
        let (count, num_places) = self.doubled;
        if count >= self.floor {
            self.before.pair[id as usize] = self.pairs.insert(pair_key(id, id), count, num_places);
            self.before.seen.push(id);
        }
    }

    /// Gives the new pairs their places. Left to right, so every list is sorted, and the visits of
    /// a later merge find "aaa" from its left end as the definition wants it.
    fn list_places(&mut self) {
        for site in self.sites.drain(..) {
            if site.before != BORDER {
                let pair = self.before.pair[site.before as usize];
                if pair != NONE {
                    let left = site.place - self.length[site.before as usize];
                    self.pairs.places[pair as usize].push(left);
                }
            }
            if site.after != BORDER {
                let pair = self.after.pair[site.after as usize];
                if pair != NONE {
                    self.pairs.places[pair as usize].push(site.place);
                }
            }
        }
    }
}

/// The pairs of bytes with a count of at least `floor`, and their places.
fn byte_pairs(slots: &[Slot], floor: i64) -> Pairs {
    let pair_of = |two: &[Slot]| {
        let (a, b) = (two[0].id, two[1].id);
        (a < 256 && b < 256).then_some((a << 8 | b) as usize)
    };
    let mut sums = vec![(0i64, 0u32); 65536];
    for two in slots.windows(2) {
        if let Some(pair) = pair_of(two) {
            sums[pair].0 += two[0].count as i64;
            sums[pair].1 += 1;
        }
    }
    let mut pairs = Pairs::default();
    pairs.below.resize_with(level(i64::MAX) + 1, Vec::new);
    let mut index = vec![NONE; 65536];
    for (pair, &(count, num_places)) in sums.iter().enumerate() {
        if num_places > 0 && count >= floor {
            index[pair] = pairs.insert(pair_key(pair as u32 >> 8, pair as u32 & 255), count, num_places);
        }
    }
    for (place, two) in slots.windows(2).enumerate() {
        if let Some(pair) = pair_of(two) {
            if index[pair] != NONE {
                pairs.places[index[pair] as usize].push(place as u32);
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn_all(list: &[(&[u8], u64)], num_merges: usize) -> Vec<(u32, u32)> {
        let mut words = Words::new();
        for (word, count) in list {
            words.push(word, *count);
        }
        learn(words, num_merges, |_| true).unwrap().unwrap()
    }

    /// The definition of BPE, literally: recount everything at every step.
    fn naive(list: &[(&[u8], u64)], num_merges: usize) -> Vec<(u32, u32)> {
        let mut words: Vec<(Vec<u32>, u64)> =
            list.iter().map(|(w, c)| (w.iter().map(|&b| b as u32).collect(), *c)).collect();
        let mut merges = vec![];
        while merges.len() < num_merges {
            // overlapping occurrences ("aaa" has two pairs) all count
            let mut counts = std::collections::BTreeMap::<(u32, u32), u64>::new();
            for (ids, count) in &words {
                for pair in ids.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let best = counts.iter().max_by_key(|(&pair, &count)| (count, Reverse(pair)));
            let Some((&pair, _)) = best else { break };
            let id = 256 + merges.len() as u32;
            merges.push(pair);
            for (ids, _) in &mut words {
                let mut i = 0;
                while i + 1 < ids.len() {
                    if (ids[i], ids[i + 1]) == pair {
                        ids[i] = id;
                        ids.remove(i + 1);
                    }
                    i += 1;
                }
            }
        }
        merges
    }

    #[test]
    fn equals_the_definition_on_random_words() {
        let mut state = 7u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for round in 0..1000 {
            let letters = 1 + random(4);
            let words: std::collections::BTreeSet<Vec<u8>> = (0..1 + random(12))
                .map(|_| (0..1 + random(12)).map(|_| b'a' + random(letters) as u8).collect())
                .collect();
            let large = if round % 5 == 0 { 5_000_000_000 } else { 1 };
            let list: Vec<(&[u8], u64)> = words.iter().map(|w| (&w[..], (1 + random(6)) * large)).collect();
            for num_merges in [1, 3, 100] {
                assert_eq!(learn_all(&list, num_merges), naive(&list, num_merges), "{list:?}");
            }
        }
    }

    #[test]
    fn counts_beyond_32_bits() {
        let just_below = u32::MAX as u64;
        assert_eq!(learn_all(&[(b"ab", just_below + 2), (b"cd", just_below + 1)], 2), [(97, 98), (99, 100)]);
        assert_eq!(learn_all(&[(b"ab", just_below), (b"cd", 3 * just_below)], 2), [(99, 100), (97, 98)]);
        // in 32 bits this sum would wrap to 0
        assert_eq!(learn_all(&[(b"xab", 1 << 31), (b"yab", 1 << 31), (b"cd", 5)], 1), [(97, 98)]);
    }

    #[test]
    fn ties_take_the_smaller_left_then_right() {
        assert_eq!(learn_all(&[(b"bc", 2), (b"ad", 2), (b"ab", 2)], 3), [(97, 98), (97, 100), (98, 99)]);
    }

    #[test]
    fn stops_when_asked_and_when_nothing_is_left() {
        assert_eq!(learn_all(&[(b"ab", 1)], 10).len(), 1);
        assert_eq!(learn_all(&[], 10).len(), 0);
        let mut words = Words::new();
        for i in 0..200_000u32 {
            words.push(&i.to_be_bytes(), 1);
        }
        assert!(learn(words, 100_000, |_| false).unwrap().is_none());
    }
}
