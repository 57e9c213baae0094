"""What measures, run with python -m bench.NAME (reference.py is what train.py compares with); no stage needs it."""
