"""
What the chat model learns from and is asked: task objects, one file per kind.

To add a task: a file here with a function that makes a Task (task.py says what a conversation is made of; spelling.py
is a model to copy), and one line in the mixture of each stage that is to learn it. If answers to it can be graded, a
function tests() in the same file; chat_eval.py finds it there.

task        what a task is, mixtures of them, what makes an answer right, and all_tests()
downloaded  SmolTalk, MMLU, ARC, GSM8K and the identity conversations, from task_data/
identity    who the model is, from a few templates
spelling    spelling a word, counting a letter in it
pydocs      the documentation inside this Python, as text and as questions
"""
from tasks.downloaded import arc, gsm8k, identity_file, mmlu, smoltalk
from tasks.identity import identity, who_is
from tasks.pydocs import docstrings
from tasks.spelling import simple_spelling, spelling_bee
from tasks.task import Mixture, all_tests, is_right
