"""How fast, how near to float64 and how small nbattn is. Every file is one of these:

- suites, which asv and the gate find: attention, cuda, decode, layers, masks, models, softmax, startup,
  variants; each for what the file of nbattn of that name has. `suite.py` is their base, `cases.py` and the
  other `*_cases.py` are calls with inputs and exact results, `roofline.py` is what a processor can do at most
- commands: `peers.py` beside other libraries, whose calls are in `rivals.py` and `*_rivals.py`; `memory.py`
  by length; `gate.py`, whether a change made a row slower (`gate_worker.py` is one of its processes,
  `gate_trial.py` proves it); `gpu.py`, the CUDA kernels on a GPU (`gpu_*.py` are its parts); `arguments.py`
  and `machine.py` are what they share: options, and where and of what commit something was measured
- `report.py` makes a page of `results/`: `measured.py` reads the files, `parts.py` makes words and tables of
  them, `figures.py` draws
"""
