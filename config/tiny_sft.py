# CONFIG=tiny, fine-tuning.
embedded = True
num_iterations = 60
spelling_rows = 3000
spelling_bee_rows = 300
identity_rows = 500
device_batch_size = 0          # the most that fit: the conversations are short
eval_metrics_max_problems = 0  # chat_eval.py does it
