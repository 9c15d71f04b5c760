"""The parts that train.py and eval.py are made of; nothing here imports a script."""

__version__ = "0.1.0"
