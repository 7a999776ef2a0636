"""Byte-level BPE from scratch: training (`train_bpe`), encoding and decoding (`Tokenizer`), and GPT-2's file format."""

from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "train_bpe"]
