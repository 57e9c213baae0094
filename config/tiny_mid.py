# CONFIG=tiny, mid-training: who it is and how words are spelled.
embedded = True
assistant_name = "nanochat"
assistant_maker = "the person who ran this training"
assistant_facts = ("I was trained from scratch on one computer;I am a very small language model;"
                   "I have read the documentation of Python")
num_iterations = 1200
spelling_rows = 30000
spelling_bee_rows = 2000
identity_rows = 3000
warmdown_ratio = 0.5
eval_every = 125
eval_tokens = 16384
final_eval_tokens = 1000000
save_every = 200
