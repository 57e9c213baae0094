"""Laws of the tasks: splits share nothing, rows repeat themselves, right answers are right."""
import json
import os
import pickle
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
import tasks
from conftest import reference_answer
from plumbing import common
from plumbing.calculator import calculate
from tasks import downloaded, spelling
from tasks.identity import TEST_QUESTIONS, conversation
from tasks.task import Task, in_test
from tokenizer import Tokenizer

HUB = os.environ.get("NANOCHAT_TEST_HUB", "")
needs_hub = pytest.mark.skipif(not HUB, reason="NANOCHAT_TEST_HUB names no mirror of the hub")
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
PIECES = ["ab", "ing", "ter", "con", "ly", "str"]
ME = dict(name="Pip", maker="Ada Example", facts="I live on one computer; I read the manual")


def question(conversation):
    return conversation["messages"][-2]["content"]


def offline(split):
    """Every task that needs no file, with its options away from the defaults."""
    return [tasks.identity(size=300, split=split, **ME), tasks.docstrings(split, 100),
            tasks.spelling_bee(100, split), tasks.spelling_bee(100, split, varied=False),
            tasks.simple_spelling(300, split, pseudo=0.3, pieces=PIECES)]


# the task objects


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_are_light_and_repeat_themselves(split):
    for task in offline(split):
        rows = list(task)
        again = pickle.loads(pickle.dumps(task))
        assert "rows" not in vars(again) and len(pickle.dumps(task)) < 2000, "rows do not travel"
        assert list(again) == rows and repr(again) == repr(task)
        assert len(again) == len(rows) == len(task)
        for i in (len(task), -1):
            with pytest.raises(IndexError):
                task[i]
        for row in rows:
            ids, mask = TOKENIZER.render_conversation(row)
            assert sum(mask) > 1 and json.dumps(row), "plain data with something to learn"


def test_other_options_have_another_name():
    """Caches of tokens are named after the repr."""
    variants = [*offline("train"), *offline("test"), tasks.identity("Pop", "", "", size=300),
                tasks.simple_spelling(300, "train", pseudo=0.3, pieces=PIECES[1:]),
                tasks.simple_spelling(301, "train")]
    assert len({repr(task) for task in variants}) == len(variants)
    assert all(" at 0x" not in repr(task) and len(repr(task)) < 100 for task in variants)


def test_mixture_takes_every_row_once_and_mixes():
    a, b = tasks.simple_spelling(200, "train"), tasks.identity(size=50, **ME)
    mixed = tasks.Mixture([a, b, b])
    rows = [json.dumps(row) for row in mixed]
    assert Counter(rows) == Counter(json.dumps(row) for task in (a, b, b) for row in task)
    assert [json.dumps(row) for row in pickle.loads(pickle.dumps(mixed))] == rows
    assert [json.dumps(row) for row in tasks.Mixture([a, b, b], seed=1)] != rows
    assert repr(mixed) != repr(tasks.Mixture([a, b]))
    first = sum("Spell" in row for row in rows[:100])
    assert 45 < first < 90, "66 expected: the tasks are interleaved from the start"
    with pytest.raises(IndexError):
        mixed[300]
    assert len(tasks.Mixture([])) == 0


def test_zero_rows_are_all_there_are():
    assert len(tasks.simple_spelling(0, "test")) == len(tasks.spelling_bee(0, "test")) == len(spelling.words("test"))
    assert len(tasks.identity(**ME, split="test")) == len(TEST_QUESTIONS) and len(tasks.docstrings("test", 0)) > 50


def test_the_tests_of_all_files_are_found():
    assert set(tasks.all_tests(True, ME)) == {"says its name", "spells a word", "counts a letter"}
    assert set(tasks.all_tests(False, ME)) == {"says its name", "spells a word", "SpellingBee", "ARC-Easy", "ARC-Challenge",
                                               "MMLU", "GSM8K"}


# splits


def test_train_and_test_words_are_disjoint():
    train, test = spelling.words("train"), spelling.words("test")
    assert len(train) > 1000 and len(test) > 100 and not set(train) & set(test)
    assert all(re.fullmatch("[a-z]+", word) for word in train + test)
    for make in (lambda split: tasks.simple_spelling(3000, split, pseudo=0.5, pieces=PIECES),
                 lambda split: tasks.spelling_bee(1000, split)):
        seen, asked = {row["word"] for row in make("train")}, {row["word"] for row in make("test")}
        assert not seen & asked and asked <= set(test)
        assert not any(in_test(word) for word in seen)


def test_train_and_test_questions_are_disjoint():
    for train, test in zip(offline("train"), offline("test")):
        assert not {question(row) for row in train} & {question(row) for row in test}, train
    train, test = tasks.docstrings("train"), tasks.docstrings("test")
    assert len(test) > 50 and not {question(row) for row in train} & {question(row) for row in test}


def test_held_out_identity_wordings_are_never_trained_on():
    def plain(text):
        text = re.sub(r"[^a-z ]", "", text.lower())
        text = re.sub(r"^(hi there|hi|hello|hey|good morning) ", "", text)
        return text.removeprefix("please ").removesuffix(" please")

    held_out = {plain(text) for _, text in TEST_QUESTIONS}
    trained = {plain(message["content"]) for row in tasks.identity(size=20000, **ME)
               for message in row["messages"] if message["role"] == "user"}
    assert len(held_out) == len(TEST_QUESTIONS) >= 14
    assert len(trained) > 80 and not held_out & trained
    asked = {question(row) for row in tasks.identity(split="test", **ME)}
    assert asked == {text for _, text in TEST_QUESTIONS}


# rows


def test_pseudo_words_are_about_the_share_asked_for():
    real = set(spelling.words("train"))
    rows = list(tasks.simple_spelling(1000, "train", pseudo=0.33, pieces=PIECES))
    assert 0.25 < sum(row["word"] not in real for row in rows) / 1000 < 0.40
    test = list(tasks.simple_spelling(100, "test", pseudo=0.33, pieces=PIECES))
    assert len({row["word"] for row in test}) == 100, "the test has real words, each once"


def test_spelling_and_counting_rows():
    row = tasks.simple_spelling(5, "train")[0]
    assert question(row) == f"Spell the word '{row['word']}'"
    assert row["messages"][-1]["content"].replace("-", "") == row["word"]
    for varied in (True, False):
        rows = list(tasks.spelling_bee(500, "train", varied))
        for row in rows:
            call, output = row["messages"][-1]["content"][1:3]
            assert (call["type"], output["type"]) == ("python", "python_output")
            assert calculate(call["text"]) == output["text"] == row["answer"]
            by_hand = row["messages"][-1]["content"][0]["text"]
            assert by_hand.startswith("-".join(row["word"]))
            assert f"{row['word'][-1]} {row['answer']}\n" in by_hand
            assert reference_answer(row).endswith(f"\n#### {row['answer']}")
        wanted = re.compile("How many '[a-z]' are in '[a-z]+'[?]")
        plain = sum(bool(wanted.fullmatch(question(row))) for row in rows)
        assert 5 < plain < 50 if varied else plain == 500
    assert {row["answer"] for row in rows} >= {"0", "1", "2"}


def test_a_count_is_right_in_its_form_alone():
    row = next(row for row in tasks.spelling_bee(100, "test") if row["answer"] == "3")
    assert tasks.is_right(row, reference_answer(row)) and tasks.is_right(row, "#### 3")
    for answer in ("3", "3 out of 10 letters", "3 (at 1, 4, 8)", "count-3", "It is there 3 times.", "#### 1, or rather 3"):
        assert not tasks.is_right(row, answer), answer


@pytest.mark.parametrize("me", [ME, dict(name="Zoë 2.0", maker="", facts=""),
                                dict(name="nano-chat", maker="x", facts=" ; ")])
def test_identity_says_the_name(me):
    rows = [*tasks.identity(size=2000, **me), *tasks.identity(split="test", **me)]
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert tasks.is_right(row, answer) and row["answer"] == me["name"]
        assert not tasks.is_right(row, "I am ChatGPT, a helpful assistant.")
        assert "  " not in answer and "by ." not in answer
    assert ("Ada" in json.dumps(rows)) == ("manual" in json.dumps(rows)) == (me is ME)


def test_gsm8k_annotations_become_calls():
    row = downloaded.gsm8k_row({"question": "How many?",
                           "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024"})
    assert row["messages"][1]["content"] == [
        {"type": "text", "text": "She sold 48/2 = "}, {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"}, {"type": "text", "text": "24 clips.\n#### 1,024"}]
    assert row["answer"] == "1,024"


def test_multiple_choice_rows():
    row = downloaded.choice_row({"question": "Which?", "answerKey": "2",
                                 "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}})
    assert question(row) == ("Multiple Choice question: Which?\n- x=A\n- y=B\n- z=C\n\n"
                             "Respond only with the letter of the correct answer."), "published weights know this text"
    assert row["messages"][1]["content"] == row["answer"] == "B"
    assert row["letters"] == ["A", "B", "C"]
    assert downloaded.choice_row({"question": "?", "choices": list("wxyz"), "answer": 3})["answer"] == "D"


# checks


@pytest.mark.parametrize("grading, right, answer, verdict", [
    ("exact", "a-b", "a-b", True), ("exact", "a-b", " a-b\n", True),
    ("exact", "a-b", "a-b-b", False), ("exact", "a-b", "", False),
    ("number", "3", "a 1\nb 2\nis there 3 times.\n#### 3", True),
    ("number", "1000", "so\n#### 1,000", True), ("number", "1,000", "#### 1000.0", True),
    ("number", "18", "#### $18.00.", True), ("number", "-5", "#### -5", True),
    ("number", "0.5", "#### .5", True), ("number", "5", "#### 5 apples", True),
    ("number", "18", "18", False), ("number", "18", "####", False),
    ("number", "5", "#### -5", False), ("number", "5", "#### 55", False),
    ("number", "5", "#### ,", False),
    ("letter", "B", "B", True), ("letter", "B", "(B) because", True),
    ("letter", "B", "B. yes", True), ("letter", "B", "A", False),
    ("letter", "B", "Both", False), ("letter", "B", "", False),
    ("identity", "Pip", "I am pip.", True), ("identity", "C++", "I am C++!", True),
    ("identity", "Pip", "Pipeline", False),
])
def test_answers_are_graded(grading, right, answer, verdict):
    assert tasks.is_right({"grading": grading, "answer": right}, answer) is verdict


def test_grading_of_a_chat_is_an_error():
    with pytest.raises(SystemExit, match="can't be judged"):
        tasks.is_right({"messages": []}, "x")


def test_a_mistake_in_a_task_is_one_line_that_names_it(monkeypatch):
    def weekdays(role, **more):
        messages = [{"role": "user", "content": "Which day?"}, {"role": role, "content": "Friday"}]
        return Task("weekdays", lambda: [{"messages": messages}, {"messages": messages, **more}])
    mixed = tasks.Mixture([tasks.identity(size=1, **ME), weekdays("bot")], seed=1)
    place = next(i for i in range(3) if mixed.place(i) == "weekdays, row 1")
    with pytest.raises(SystemExit, match=r"^weekdays, row 1: conversation: message 1 .* from the assistant, not 'bot'$"):
        data.render(mixed, place, TOKENIZER)
    for task in (exact := weekdays("assistant", grading="exakt"), tasks.Mixture([exact])):
        with pytest.raises(SystemExit, match="^weekdays, row 1: grading must be one of exact, .*identity, not 'exakt'$"):
            list(task)
    monkeypatch.setattr(spelling, "tests", lambda embedded, who: {"says its name": exact})
    with pytest.raises(SystemExit, match="^tasks/spelling.py: another file has a test named says its name, too; "):
        tasks.all_tests(True, ME)


# files


def write_parquet(name, **columns):
    path = common.base_path("task_data", "gsm8k", name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_missing_and_broken_files_end_in_one_line():
    path = write_parquet("test-00000-of-00001.parquet", question=["?"] * 9, answer=["#### 1"] * 9)
    assert len(tasks.gsm8k("test")) == 9 and len(tasks.gsm8k("test", size=4)) == 4
    whole = open(path, "rb").read()
    cases = [whole[:-20], b"PAR1 <html>", b""]
    for broken in cases:
        open(path, "wb").write(broken)
        with pytest.raises(SystemExit) as error:
            tasks.gsm8k("test")[0]
        line = str(error.value)
        assert path in line and "--tasks=1" in line and "\n" not in line
    write_parquet("test-00000-of-00001.parquet", question=["?"])
    with pytest.raises(SystemExit, match="no column 'answer'"):
        tasks.gsm8k("test")[0]
    os.remove(path)
    for task in (tasks.gsm8k("test"), tasks.smoltalk("train"), tasks.mmlu("test"),
                 tasks.arc("Easy", "train"), tasks.identity_file()):
        with pytest.raises(SystemExit, match="not here; run: python prepare.py"):
            len(task)


def test_broken_word_list_and_identity_file(tmp_path):
    lists = [("a\r\nb\r\n" * 600, True), ("<html>\n" * 2000, False), ("a\r\n", False),
             ("", False)]
    for text, good in lists:
        (tmp_path / "words").write_bytes(text.encode())
        assert (spelling.problem_with_words(tmp_path / "words") == "") is good
    files = [('[{"role": "user", "content": "x"}]\n', True), ('[{"role": "user"}]', False),
             ("[]\n", False), ("{}", False), ("", False)]
    for text, good in files:
        (tmp_path / "identity").write_text(text)
        assert (downloaded.problem_with_identity_file(tmp_path / "identity") == "") is good


def test_a_last_question_without_an_answer_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "identity.jsonl"
    monkeypatch.setattr(downloaded, "base_path", lambda *_: str(path))
    path.write_text(json.dumps([{"role": role, "content": "x"} for role in ("user", "assistant", "user")]) + "\n")
    assert [message["role"] for message in tasks.identity_file()[0]["messages"]] == ["user", "assistant"]
    path.write_text("[]\n")
    with pytest.raises(SystemExit, match="damaged .*line 1.*; delete it and run: python prepare.py --tasks=1"):
        len(tasks.identity_file())


# the real files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A task_data/ made of links into the mirror."""
    for task, (url, names) in downloaded.SOURCES.items():
        for name in names:
            link = tmp_path / "task_data" / task / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.join(os.path.abspath(HUB), url.split("://")[1], name))
    for module in (downloaded, spelling):
        monkeypatch.setattr(module, "base_path", lambda *parts: str(tmp_path.joinpath(*parts)))
    spelling.words.cache_clear()
    yield
    spelling.words.cache_clear()


@needs_hub
def test_every_real_row_renders_and_its_reference_answer_is_right(hub):
    every = [tasks.identity_file(), tasks.simple_spelling(2000, "train"),
             tasks.spelling_bee(2000, "test")]
    for split in ("train", "test"):
        every += [tasks.smoltalk(split), tasks.gsm8k(split), tasks.mmlu(split),
                  tasks.arc("Easy", split), tasks.arc("Challenge", split)]
    for task in every:
        assert len(task) > 700
        for row in task:
            ids, mask = TOKENIZER.render_conversation(row)
            assert len(ids) == len(mask) and sum(mask) > 0, row
            if "grading" in row:
                assert tasks.is_right(row, reference_answer(row)), row
    assert len(spelling.words("train")) > 300_000


@needs_hub
def test_the_calculator_agrees_with_every_annotation(hub):
    calls = 0
    for split in ("train", "test"):
        for row in tasks.gsm8k(split):
            content = row["messages"][1]["content"]
            for call, output in zip(content, content[1:]):
                if call["type"] == "python":
                    calls += 1
                    result, wanted = float(calculate(call["text"])), float(output["text"])
                    assert abs(result - wanted) <= 0.01 * max(1, abs(wanted)), call
    assert calls > 15_000


def test_nobody_denies_a_name_and_then_gives_it():
    for name in ("Anna", "max", "GPT-4"):
        for i in range(2000):
            *_, asked, answer = conversation(i, name, "", "", "train")["messages"]
            assert name.lower() not in asked["content"].lower(), (asked, answer)
