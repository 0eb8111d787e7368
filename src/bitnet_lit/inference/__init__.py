"""Running a model: engines that compute logits, sampling, generation, evaluation. Imports no Lightning, no Hydra."""
