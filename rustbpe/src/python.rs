//! The Python module `rustbpe`: the class `Tokenizer`.
//!
//! Training has two sources of documents, a Python iterator and Parquet files. Both end in
//! `Feeder::push`, which copies documents into batches for the counting threads. This thread is
//! then the only one that touches Python: it pulls the documents, looks for Ctrl-C, reports
//! progress. Whatever goes wrong becomes an ordinary Python exception, and the tokenizer changes
//! only when training has succeeded.

use crate::count::{Counter, Pool};
use crate::encode::Encoder;
use crate::merge::{learn, Words};
use crate::split::{Batch, Splitter, DEFAULT_PATTERN};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of text per batch: few enough to stay in a processor's second cache until they are
/// counted, and enough that handing them over costs nothing.
const BATCH_BYTES: usize = 1 << 18;

/// Documents that pyarrow decodes at once, some 100 kB for the same reason.
const BATCH_ROWS: usize = 128;

/// Bytes of a Parquet file that pyarrow reads at once.
const READ_BYTES: usize = 1 << 18;

/// Counting threads when the caller leaves the number to us. One thread feeds them, and more than
/// eight would mostly wait for it, each with a table of its own in memory.
const MAX_COUNTING_THREADS: usize = 8;

/// Bytes of text that are encoded without looking for Ctrl-C: some hundredths of a second.
const UNWATCHED_BYTES: usize = 1 << 20;

/// Mistakes in arguments and in data are ValueErrors.
fn value_error(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}

/// The error for too small a text. Its attribute `most_tokens` says how many tokens there can be,
/// for callers that count tokens of their own as well.
fn too_few(py: Python, most_tokens: usize, message: String) -> PyErr {
    let error = value_error(message);
    match error.value(py).setattr("most_tokens", most_tokens) {
        Ok(()) => error,
        Err(other) => other,
    }
}

fn non_negative(name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| value_error(format!("{name} is {value}, it must not be negative")))
}

fn threads_or_all(num_threads: i64, most: usize) -> PyResult<usize> {
    match non_negative("num_threads", num_threads)? {
        0 => Ok(thread::available_parallelism().map_or(1, usize::from).min(most)),
        number => Ok(number.min(1024)),
    }
}

/// Time between two lines of progress.
const BETWEEN_LINES: Duration = Duration::from_secs(3);

/// Looks for Ctrl-C, and calls the caller's function with a line every few seconds.
struct Reporter {
    callback: Option<Py<PyAny>>,
    start: Instant,
    last_line: Instant,
    documents: usize,
    bytes: usize,
}

impl Reporter {
    fn new(callback: Option<Py<PyAny>>) -> Reporter {
        let now = Instant::now();
        Reporter { callback, start: now, last_line: now, documents: 0, bytes: 0 }
    }

    /// Called often. The last line of a phase always goes out, so that the caller sees the totals.
    fn report(&mut self, py: Python, last_of_phase: bool, line: impl FnOnce(&Reporter) -> String) -> PyResult<()> {
        py.check_signals()?;
        if let Some(callback) = &self.callback {
            if last_of_phase || self.last_line.elapsed() >= BETWEEN_LINES {
                callback.call1(py, (line(self),))?;
                self.last_line = Instant::now();
            }
        }
        Ok(())
    }

    fn report_counting(&mut self, py: Python, last_of_phase: bool) -> PyResult<()> {
        self.report(py, last_of_phase, |this| {
            let mb = this.bytes as f64 / 1e6;
            let rate = mb / this.start.elapsed().as_secs_f64().max(1e-9);
            format!("counting: {} documents, {mb:.1} MB, {rate:.0} MB/s", this.documents)
        })
    }
}

/// Takes documents one by one and hands them to the counting threads in batches.
struct Feeder {
    reporter: Reporter,
    pool: Pool,
    batch: Batch,
    batch_documents: usize,
}

impl Feeder {
    /// Copies one document, so that the Python string may go at once.
    fn push(&mut self, py: Python, document: &str) -> PyResult<()> {
        self.batch.push(document);
        self.reporter.documents += 1;
        self.reporter.bytes += document.len();
        if self.batch.documents() >= self.batch_documents || self.batch.text().len() >= BATCH_BYTES {
            self.flush(py)?;
        }
        Ok(())
    }

    /// Hands the batch over, and waits while the counting threads are too far behind.
    fn flush(&mut self, py: Python) -> PyResult<()> {
        let mut batch = std::mem::replace(&mut self.batch, self.pool.batch());
        while let Some(refused) = self.pool.try_send(batch).map_err(value_error)? {
            batch = refused;
            self.nap(py)?;
        }
        self.reporter.report_counting(py, false)
    }

    /// Lets the counting threads, and other Python threads, work for a moment.
    fn nap(&self, py: Python) -> PyResult<()> {
        py.detach(|| thread::sleep(Duration::from_millis(1)));
        py.check_signals()
    }

    /// Waits until everything is counted.
    fn finish(mut self, py: Python) -> PyResult<(Counter, Reporter)> {
        self.flush(py)?;
        self.pool.close();
        while !self.pool.is_done() {
            self.nap(py)?;
        }
        let counter = self.pool.finish().map_err(value_error)?;
        self.reporter.report_counting(py, true)?;
        Ok((counter, self.reporter))
    }
}

/// What the two ways of training have in common.
struct Options {
    vocab_size: i64,
    pattern: Option<String>,
    num_threads: i64,
    progress: Option<Py<PyAny>>,
    batch_documents: usize,
}

/// All of training; `feed` pushes the documents.
fn train(py: Python, options: Options, feed: impl FnOnce(&mut Feeder) -> PyResult<()>) -> PyResult<Encoder> {
    // everything that can be wrong with the arguments, before the first document is read
    let vocab_size = options.vocab_size;
    if vocab_size < 256 {
        let message = format!("vocab_size is {vocab_size}, it must be at least 256: one token per byte");
        return Err(value_error(message));
    }
    let pattern = options.pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_string());
    let splitter = Splitter::new(&pattern).map_err(value_error)?;
    let num_threads = threads_or_all(options.num_threads, MAX_COUNTING_THREADS)?;

    // An error from here on drops the feeder and with it the pool, which stops the threads.
    let mut feeder = Feeder {
        reporter: Reporter::new(options.progress),
        pool: Pool::new(&splitter, num_threads),
        batch: Batch::new(),
        batch_documents: options.batch_documents,
    };
    feed(&mut feeder)?;
    let (counter, mut reporter) = feeder.finish(py)?;
    if counter.is_empty() {
        let documents = reporter.documents;
        let message = format!("nothing to train on: {documents} documents without any text");
        return Err(too_few(py, 256, message));
    }

    // Python's lock is free during the merges and taken only to look for Ctrl-C.
    let num_merges = vocab_size as usize - 256;
    let mut stopped = Ok(());
    let merges = py.detach(|| {
        learn(Words::from(counter), num_merges, |done| {
            let line = |_: &Reporter| format!("merging: {done} of {num_merges} merges");
            stopped = Python::attach(|py| reporter.report(py, false, line));
            stopped.is_ok()
        })
    });
    stopped?;
    let merges = merges.map_err(value_error)?.unwrap_or_default();
    if merges.len() < num_merges {
        let most = 256 + merges.len();
        let message = format!(
            "vocab_size is {vocab_size}, but this text gives only {most} tokens: with these, each of its \
             distinct chunks is one token; train on more text or ask for at most {most}"
        );
        return Err(too_few(py, most, message));
    }
    reporter.report(py, true, |_| format!("merging: {num_merges} of {num_merges} merges"))?;
    py.detach(|| Encoder::new(&pattern, splitter, Encoder::tokens_of_merges(&merges))).map_err(value_error)
}

/// The UTF-8 text of a Python string. `what` names it in the error, as in "document 3".
fn utf8<'a>(object: &'a Bound<PyAny>, what: impl Fn() -> String) -> PyResult<&'a str> {
    let Ok(string) = object.cast::<PyString>() else {
        let kind = object.get_type().name()?;
        return Err(PyTypeError::new_err(format!("{} is {kind}, not str", what())));
    };
    string.to_str().map_err(|error| value_error(format!("{} has no UTF-8 form: {error}", what())))
}

/// The strings of one pyarrow array (type string or large_string, no nulls) without making Python
/// objects of them: calls `each` with the text of every row, until it returns false.
///
/// Arrow keeps them as one buffer with all texts in a row and one with the offset at which each
/// begins; text i is `data[offsets[first + i]..offsets[first + i + 1]]`.
fn for_each_arrow_string(
    array: &Bound<PyAny>,
    each: &mut dyn FnMut(&str) -> PyResult<bool>,
    damaged: &dyn Fn(&str) -> PyErr,
) -> PyResult<bool> {
    let offset_bytes = match array.getattr("type")?.str()?.to_str()? {
        "string" => 4,
        _ => 8, // large_string
    };
    let rows = array.len()?;
    let first: usize = array.getattr("offset")?.extract()?;
    let buffers: Vec<Option<Bound<PyAny>>> = array.call_method0("buffers")?.extract()?;
    let memory = |i: usize| -> PyResult<&[u8]> {
        let Some(Some(buffer)) = buffers.get(i) else { return Ok(&[]) };
        let address: usize = buffer.getattr("address")?.extract()?;
        let size: usize = buffer.getattr("size")?.extract()?;
        if address == 0 || size == 0 {
            return Ok(&[]);
        }
        // SAFETY: a pyarrow Buffer owns `size` readable bytes at `address`, and nobody writes into
        // the buffers of an array. The slices cannot outlive `buffers`, which keeps them alive.
        // measured: making Python strings instead costs as much as half of all counting, 2026-11
        Ok(unsafe { std::slice::from_raw_parts(address as *const u8, size) })
    };
    let (offsets, data) = (memory(1)?, memory(2)?);
    let offset = |row: usize| -> PyResult<usize> {
        let at = (first + row) * offset_bytes;
        let bytes = offsets.get(at..at + offset_bytes).ok_or_else(|| damaged("offsets are missing"))?;
        // little-endian, extended to 8 bytes; a negative offset would be far outside the data
        let mut wide = [0; 8];
        wide[..offset_bytes].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(wide) as usize)
    };
    for row in 0..rows {
        let bytes = data.get(offset(row)?..offset(row + 1)?);
        let bytes = bytes.ok_or_else(|| damaged("offsets point outside the data"))?;
        // the file format promises UTF-8, but nobody has checked
        let text = std::str::from_utf8(bytes).map_err(|error| damaged(&error.to_string()))?;
        if !each(text)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The first `most` characters of a text.
fn first_chars(text: &str, most: usize) -> &str {
    if text.len() <= most {
        return text; // no more bytes than that, so no more characters either
    }
    text.char_indices().nth(most).map_or(text, |(end, _)| &text[..end])
}

/// Pushes the text column of Parquet files, up to the two limits (0 = none). Asks for a path when
/// the file before has been read. Returns how many characters there were.
fn feed_parquet(
    py: Python,
    feeder: &mut Feeder,
    paths: &Bound<PyAny>,
    column: &str,
    max_chars: usize,
    doc_cap: usize,
) -> PyResult<usize> {
    let parquet_file = py.import("pyarrow.parquet")?.getattr("ParquetFile")?;
    // by default pyarrow first reads all compressed columns of the file into memory
    let piecewise = PyDict::new(py);
    piecewise.set_item("pre_buffer", false)?;
    piecewise.set_item("buffer_size", READ_BYTES)?;
    let no_limit = |limit| if limit == 0 { usize::MAX } else { limit };
    let (max_chars, doc_cap) = (no_limit(max_chars), no_limit(doc_cap));
    let mut num_chars = 0;
    for path in paths.try_iter()? {
        let path = &path?;
        // pyarrow's errors are ValueErrors or OSErrors, and most do not name the file
        let named = |error: PyErr| {
            let message = error.value(py).to_string();
            let reason = message.lines().next().unwrap_or_default();
            let about_file = error.is_instance_of::<PyValueError>(py) || error.is_instance_of::<PyOSError>(py);
            match about_file && !message.contains(&path.to_string()) {
                true => value_error(format!("{path}: {reason}")),
                false => error,
            }
        };
        let file = parquet_file.call((path,), Some(&piecewise)).map_err(named)?;
        let schema = file.getattr("schema_arrow")?;
        let names: Vec<String> = schema.getattr("names")?.extract()?;
        if !names.iter().any(|name| name == column) {
            return Err(value_error(format!("{path}: no column '{column}'; it has {}", names.join(", "))));
        }
        let kind = schema.call_method1("field", (column,))?.getattr("type")?.str()?.to_string();
        let plain = kind == "string" || kind == "large_string";
        // other ways to store strings, which pyarrow turns into the plain one
        let convertible = ["string_view", "dictionary<values=string", "dictionary<values=large_string"];
        if !plain && !convertible.iter().any(|start| kind.starts_with(start)) {
            return Err(value_error(format!("{path}: column '{column}' holds {kind}, not string")));
        }
        let (all_row_groups, use_threads) = (py.None(), false); // its threads are for several columns
        let arguments = (BATCH_ROWS, all_row_groups, [column], use_threads);
        for batch in file.call_method1("iter_batches", arguments).map_err(named)?.try_iter()? {
            let mut array = batch.map_err(named)?.call_method1("column", (0,))?;
            if !plain {
                array = array.call_method1("cast", ("large_string",)).map_err(named)?;
            }
            if array.getattr("null_count")?.extract::<usize>()? > 0 {
                array = array.call_method0("drop_null")?;
            }
            let mut push = |text: &str| {
                let text = first_chars(text, doc_cap.min(max_chars - num_chars));
                num_chars += text.chars().count();
                feeder.push(py, text)?;
                Ok(num_chars < max_chars)
            };
            let damaged = |reason: &str| value_error(format!("{path}: column '{column}' is damaged: {reason}"));
            if !for_each_arrow_string(&array, &mut push, &damaged)? {
                return Ok(num_chars); // enough
            }
        }
    }
    Ok(num_chars)
}

/// What `job` returns, which encodes so many bytes. Much text is encoded by another thread, while
/// this one looks for Ctrl-C and then sets the flag at which the job stops.
fn watched<R: Send>(
    py: Python,
    num_bytes: usize,
    job: impl Fn(&AtomicBool) -> Result<R, String> + Send + Sync,
) -> PyResult<R> {
    let stop = AtomicBool::new(false);
    if num_bytes <= UNWATCHED_BYTES {
        return py.detach(|| job(&stop)).map_err(value_error);
    }
    py.detach(|| {
        thread::scope(|scope| {
            let Ok(thread) = thread::Builder::new().spawn_scoped(scope, || job(&stop)) else {
                return job(&stop).map_err(value_error); // refused, so without Ctrl-C
            };
            while !thread.is_finished() {
                thread::sleep(Duration::from_millis(1));
                Python::attach(|py| py.check_signals()).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            }
            let broken = |_| PyRuntimeError::new_err("the encoding thread broke down");
            thread.join().map_err(broken)?.map_err(value_error)
        })
    })
}

/// Writes numbers into a new bytearray and lets numpy look at it as an array of `dtype`.
fn numpy_array<'py, const N: usize>(
    py: Python<'py>,
    dtype: &str,
    length: usize,
    numbers: impl Iterator<Item = [u8; N]>,
) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new_with(py, length * N, |bytes| {
        for (place, number) in bytes.chunks_exact_mut(N).zip(numbers) {
            place.copy_from_slice(&number);
        }
        Ok(())
    })?;
    py.import("numpy")?.call_method1("frombuffer", (bytes, dtype))
}

/// A byte-level BPE tokenizer: learns a vocabulary from text, encodes and decodes with it.
///
/// A new one knows the 256 single bytes. It can be used from several threads at once.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    encoder: RwLock<Arc<Encoder>>,
}

// The encoder never changes; training puts another one in its place. So a thread that encodes
// while another one trains is never disturbed: it keeps the encoder it has.
impl Tokenizer {
    fn holding(encoder: Encoder) -> Tokenizer {
        Tokenizer { encoder: RwLock::new(Arc::new(encoder)) }
    }

    fn encoder(&self) -> Arc<Encoder> {
        Arc::clone(&self.encoder.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    fn bytes_of(&self, ids: Vec<i64>) -> PyResult<Vec<u8>> {
        self.encoder().decode(&ids).map_err(value_error)
    }

    fn replace(&self, encoder: Encoder) {
        *self.encoder.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::new(encoder);
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Tokenizer> {
        let splitter = Splitter::new(DEFAULT_PATTERN).map_err(value_error)?;
        let tokens = Encoder::tokens_of_merges(&[]);
        Ok(Tokenizer::holding(Encoder::new(DEFAULT_PATTERN, splitter, tokens).map_err(value_error)?))
    }

    /// The tokenizer with these (bytes, rank) pairs, as get_mergeable_ranks gives them.
    ///
    /// The ranks must be 0, 1, 2, ... in any order, and every single byte must have one.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None))]
    fn from_ranks(py: Python, ranks: Vec<(Vec<u8>, i64)>, pattern: Option<String>) -> PyResult<Tokenizer> {
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_string());
        let splitter = Splitter::new(&pattern).map_err(value_error)?;
        // each token to the place of its rank; an empty place is one that no rank has filled
        let mut tokens: Vec<Box<[u8]>> = vec![Box::from([]); ranks.len()];
        for (token, rank) in ranks {
            match usize::try_from(rank).ok().and_then(|rank| tokens.get_mut(rank)) {
                Some(place) if place.is_empty() => *place = token.into(),
                Some(_) => return Err(value_error(format!("rank {rank} occurs twice"))),
                None => {
                    let number = tokens.len();
                    return Err(value_error(format!("rank {rank} among {number} tokens: ranks count from 0")));
                }
            }
        }
        py.detach(|| Encoder::new(&pattern, splitter, tokens)).map(Tokenizer::holding).map_err(value_error)
    }

    /// Learns vocab_size tokens, 256 bytes included, from an iterator of str.
    ///
    /// buffer_size: most documents handed to a counting thread at once; changes no result
    /// pattern:     the split pattern; None = nanochat's
    /// num_threads: counting threads; 0 = one per core, at most 8; changes no result
    /// progress:    called with a line of text every few seconds and at the end of each phase
    /// raises       ValueError, TypeError, or what the iterator raises; the tokenizer is then as before.
    ///              The ValueError for too small a text has `most_tokens`: how many it can give
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=0, progress=None))]
    #[allow(clippy::too_many_arguments)] // they are keywords in Python
    fn train_from_iterator(
        &self,
        py: Python,
        iterator: &Bound<PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<String>,
        num_threads: i64,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        if buffer_size < 1 {
            return Err(value_error(format!("buffer_size is {buffer_size}, it must be at least 1")));
        }
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("the iterator is a str; wrap a single text in a list"));
        }
        let batch_documents = buffer_size as usize;
        let options = Options { vocab_size, pattern, num_threads, progress, batch_documents };
        let encoder = train(py, options, |feeder| {
            for (i, document) in iterator.try_iter()?.enumerate() {
                feeder.push(py, utf8(&document?, || format!("document {i} of the iterator"))?)?;
            }
            Ok(())
        })?;
        self.replace(encoder);
        Ok(())
    }

    /// Learns vocab_size tokens, 256 bytes included, from the text column of Parquet files.
    ///
    /// The same result as train_from_iterator on the same documents, and faster: pyarrow reads the
    /// files, but no Python strings are made. Nulls are skipped.
    ///
    /// paths:       one path or an iterator of them, which may wait until the next file is there
    /// max_chars:   stop after this many characters, if need be inside a document; 0 = no limit
    /// doc_cap:     use only this many characters of each document; 0 = all
    /// returns      (documents, characters) that were used
    /// pattern, num_threads, progress, raises: as in train_from_iterator
    #[pyo3(signature = (paths, vocab_size, max_chars=0, doc_cap=0, pattern=None, column="text", *,
                        num_threads=0, progress=None))]
    #[allow(clippy::too_many_arguments)] // they are keywords in Python
    fn train_from_parquet<'py>(
        &self,
        py: Python<'py>,
        paths: Bound<'py, PyAny>,
        vocab_size: i64,
        max_chars: i64,
        doc_cap: i64,
        pattern: Option<String>,
        column: &str,
        num_threads: i64,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(usize, usize)> {
        let max_chars = non_negative("max_chars", max_chars)?;
        let doc_cap = non_negative("doc_cap", doc_cap)?;
        let is_path = paths.is_instance_of::<PyString>() || paths.hasattr("__fspath__")?;
        let paths = if is_path { PyList::new(py, [paths])?.into_any() } else { paths };
        let options = Options { vocab_size, pattern, num_threads, progress, batch_documents: usize::MAX };
        let mut used = (0, 0);
        let encoder = train(py, options, |feeder| {
            let num_chars = feed_parquet(py, feeder, &paths, column, max_chars, doc_cap)?;
            used = (feeder.reporter.documents, num_chars);
            Ok(())
        })?;
        self.replace(encoder);
        Ok(used)
    }

    /// The split pattern, a regular expression.
    fn get_pattern(&self) -> String {
        self.encoder().pattern().to_string()
    }

    /// Number of tokens: 256 bytes and one per merge.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder().tokens().len()
    }

    /// All tokens as a list of (bytes, rank); a token's rank is its id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let encoder = self.encoder();
        encoder.tokens().iter().enumerate().map(|(id, token)| (PyBytes::new(py, token), id)).collect()
    }

    /// The ids of a text.
    fn encode<'py>(&self, py: Python<'py>, text: &Bound<PyAny>) -> PyResult<Bound<'py, PyList>> {
        let text = utf8(text, || "the text".to_string())?;
        let encoder = self.encoder();
        let ids = watched(py, text.len(), |stop| {
            let mut ids = vec![];
            encoder.with_worker(|worker| encoder.encode(text, worker, &mut ids, stop)).map(|()| ids)
        })?;
        let mut parts = ids.chunks(UNWATCHED_BYTES);
        let list = PyList::new(py, parts.next().unwrap_or_default())?;
        for part in parts {
            py.check_signals()?;
            part.iter().try_for_each(|&id| list.append(id))?;
        }
        Ok(list)
    }

    /// The ids of many texts, in two numpy arrays: (ids, offsets).
    ///
    /// ids:         of all texts in a row; uint16, or uint32 when an id may exceed 65,535
    /// offsets:     int64, one more than there are texts; text i is ids[offsets[i]:offsets[i + 1]]
    /// prepend:     an id to put in front of every text, such as that of <|bos|>; None = nothing
    /// num_threads: 0 = one per core; changes no result
    #[pyo3(signature = (texts, *, prepend=None, num_threads=0))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        prepend: Option<u32>,
        num_threads: i64,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts is a str; wrap a single text in a list"));
        }
        let num_threads = threads_or_all(num_threads, usize::MAX)?;
        // these keep the strings alive and readable while Python's lock is free
        let mut documents: Vec<PyBackedStr> = vec![];
        for (i, text) in texts.try_iter()?.enumerate() {
            let text = text?;
            utf8(&text, || format!("text {i}"))?;
            documents.push(text.extract()?);
        }
        let encoder = self.encoder();
        let num_bytes = documents.iter().map(|document| document.len()).sum();
        let parts = watched(py, num_bytes, |stop| encoder.encode_batch(&documents, prepend, num_threads, stop))?;

        let num_ids = parts.iter().map(|part| part.ids.len()).sum();
        let ids = || parts.iter().flat_map(|part| &part.ids);
        // two bytes per id if all ids fit, as in token files
        let small = encoder.tokens().len() <= 1 << 16 && prepend.is_none_or(|id| id < 1 << 16);
        let ids = match small {
            true => numpy_array(py, "uint16", num_ids, ids().map(|&id| (id as u16).to_ne_bytes()))?,
            false => numpy_array(py, "uint32", num_ids, ids().map(|&id| id.to_ne_bytes()))?,
        };
        let mut end = 0i64;
        let ends = parts.iter().flat_map(|part| &part.lengths).map(|&length| {
            end += length as i64;
            end
        });
        let offsets = std::iter::once(0).chain(ends).map(i64::to_ne_bytes);
        Ok((ids, numpy_array(py, "int64", documents.len() + 1, offsets)?))
    }

    /// The text of token ids. Bytes that are not UTF-8, such as half a character, become U+FFFD.
    fn decode(&self, ids: Vec<i64>) -> PyResult<String> {
        Ok(String::from_utf8_lossy(&self.bytes_of(ids)?).into_owned())
    }

    /// The bytes of token ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(ids)?))
    }
}

/// Trains and applies byte-level BPE tokenizers.
#[pymodule]
mod rustbpe {
    use super::*;

    #[pymodule_export]
    use super::Tokenizer;

    #[pymodule_init]
    fn init(module: &Bound<PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // tells this module from the published package of the same module name
        module.add("__crate__", env!("CARGO_PKG_NAME"))
    }
}
