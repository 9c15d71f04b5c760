"""The parts that train.py and eval.py are built from; nothing here imports a script."""

__version__ = "0.1.0"
