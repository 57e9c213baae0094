"""
What the chat model learns from and is asked: task objects, one file per kind.

downloaded  SmolTalk, MMLU, ARC, GSM8K and the identity conversations, from task_data/
identity    who the model is, from a few templates
spelling    spelling a word, counting a letter in it
pydocs      the documentation inside this Python, as text and as questions
"""
from tasks.downloaded import (arc, check, docstrings, gsm8k, identity, identity_file, mixture, mmlu, simple_spelling, smoltalk,
                              spelling_bee)
