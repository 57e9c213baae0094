# CONFIG=tiny, reinforcement learning, with RL=1: counting a letter, minutes on a CPU.
task = "spelling_bee"
num_iterations = 40
num_samples = 8
init_lr_frac = 0.1             # with 0.3 a model of this size gives up counting and says 1 to everything
max_new_tokens = 160           # a right answer has 90 to 150
eval_every = 20
eval_examples = 50
save_every = 10                # half a minute of work
device_batch_size = 32         # answers: as fast as more, in less memory
