"""This package runs a trained model, without Lightning or Hydra.

language_model.py is what users hold. Below it: generator.py makes texts, sampling.py chooses tokens, stop_texts.py ends
them, and engines/ computes logits. evaluation.py measures a model, print_texts.py is the command `infer`.
"""
