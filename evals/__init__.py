"""
How a model is judged and how the results are shown.

metrics             bits per byte, loss on answers, right answers to questions
core                CORE: 22 tasks for a base model
humaneval           programs to be written; sandbox and jail run them
saved               the file that an evaluation writes
results, curves     what a run has left on the disk, as numbers and as a picture
live                a run that is watched while it goes on
"""
