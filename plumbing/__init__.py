"""
What every stage needs and a first reading can skip. Nothing in here imports anything outside of this folder.

common        where files live, the environment, atomic files, logs and the progress line
configurator  knobs: files and flags that override the globals of a script
budget        arithmetic of a run before it runs: parameters, FLOPs, memory, batches
machine       device, number format, threads and ranks
download      files from the network, resumed and verified
background    a function in a process beside the trainer
calculator    the tool that a chat model may call
stop          signals, closed pipes, one run in a folder
packages      imported first: one line where the packages are not installed, or at a signal
"""
