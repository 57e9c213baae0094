"""
What every stage needs and a first reading can skip. Nothing in here imports anything outside of this folder.

common        where files live, the environment, atomic files, logs and the progress line
configurator  knobs: files and flags that override the globals of a script
budget        arithmetic of a run before it runs: parameters, FLOPs, memory, batches
machine       device, number format, threads and ranks
fit           the micro-batch that fits, found by trying
download      files from the network, resumed and verified
background    a function in a process beside the trainer
calculator    the tool that a chat model may call
stop          signals, closed pipes, one run in a folder
web           what a server is careful about: whom it answers, how much it reads
packages      imported first: one line where the packages are not installed, or at a signal
launch        torchrun, which ends in one line
"""
