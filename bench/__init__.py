"""What measures, run with python -m bench.NAME; no stage needs it."""
