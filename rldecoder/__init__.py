"""RL-Decoder: read a frozen language model's middle layers through sparse features."""

__version__ = "0.1.0"
