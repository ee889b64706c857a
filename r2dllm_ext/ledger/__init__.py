"""The ledger task: generator, tokenizer, verifier, training script and a small trained model."""

from .task import ANSWER_LENGTH, Problem, Sample, Verdict, encode_sample, make_sample, verify
from .tokenizer import Tokenizer

__all__ = [
    "ANSWER_LENGTH", "Problem", "Sample", "Tokenizer", "Verdict", "encode_sample", "make_sample",
    "verify",
]
