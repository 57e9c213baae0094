"""
What the chat model learns from and is asked: task objects, one file per kind.

A new file with a function that makes a Task, and tests() if its answers can be checked, is a new task: one line
in the mixture of each stage that should learn it, and the evaluations find the rest.

task        what a task is, mixtures of them, checks of answers, and all_tests()
downloaded  SmolTalk, MMLU, ARC, GSM8K and the identity conversations, from task_data/
identity    who the model is, from a few templates
spelling    spelling a word, counting a letter in it
pydocs      the documentation inside this Python, as text and as questions
"""
from tasks.downloaded import arc, gsm8k, identity_file, mmlu, smoltalk
from tasks.identity import identity, who_is
from tasks.pydocs import docstrings
from tasks.spelling import simple_spelling, spelling_bee
from tasks.task import Mixture, all_tests, check
