"""Names of keys, of options of groups and of flags in other tools, and what they are called in this package.

The tables are data for `did_you_mean.py` and `words_and_flags.py`. They hold names that users of other tools type, not
misspellings.
"""

from __future__ import annotations

# Names of keys in other trainers (lightning-hydra-template, transformers, nanoGPT, llama2.c), with our names for them.
ALIASES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "steps": "max_steps",
    "max_iters": "max_steps",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "data_dir": "data.dir",
    "dataset": "data.dir",
    "seq_len": "sequence_length",
    "max_seq_len": "max_position_embeddings",
    "block_size": "max_position_embeddings",
    "context_length": "max_position_embeddings",
    "dim": "hidden_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "n_gpus": "trainer.devices",
    "nodes": "num_nodes",
    "nnodes": "num_nodes",
    "workers": "num_workers",
    "top_n": "top_k",
    "n_samples": "num_samples",
    "dtype": "precision",
    "grad_clip": "gradient_clip_val",
    "max_grad_norm": "gradient_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "grad_accum": "accumulate_grad_batches",
    "eval_interval": "val_check_interval",
    "eval_steps": "val_check_interval",
    "eval_iters": "limit_val_batches",
    "warmup_iters": "warmup_steps",
    "warmup": "warmup_steps",
    "save_steps": "checkpoint_every_n_steps",
    "logging_steps": "log_every_n_steps",
    "optimizer": "optim",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "datamodule": "data",
    "resume_from_checkpoint": "resume",
    "T": "temperature",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "ckpt": "checkpoint",
}

_SMOKE = "mode=smoke runs everything in seconds, mode=overfit learns one batch by heart, mode=profile traces"
_NAME = "hydra.run.dir=outputs/<name> names a run and its folder"
_CHECKPOINTS = (
    "last.ckpt and best.ckpt are always written; callbacks.checkpoint_every_n_steps=<steps> writes more often"
)
_CHECKPOINT = "it is checkpoint=<run or model folder>"
_EARLY = (
    "it is callbacks.extra.early._target_=lightning.pytorch.callbacks.EarlyStopping "
    "callbacks.extra.early.monitor=val/loss"
)
_ENGINE = (
    "evaluate has no engine=: a CPU scores text (data=<file>) in the native engine, all else PyTorch computes; "
    "accelerator=cpu or gpu is the device"
)
_LENGTH = "trainer.max_steps=<steps> or trainer.max_epochs=<epochs> is the length of a run"
_BAR = "callbacks.progress_bar=false leaves the bar out"
# Keys and groups of other trainers that this package does not have, and what to use instead. An entry holds for a key
# and for every key in the group of that name.
WORDS = {
    "train": {
        "ckpt_path": "resume=<run folder> goes on with a run, init_from=<run folder> starts another from its weights",
        "debug": _SMOKE,
        "trainer.fast_dev_run": _SMOKE,
        "trainer.overfit_batches": _SMOKE,
        "trainer.limit_train_batches": "trainer.max_steps=<steps> ends a run, data.max_train_sequences=<n> trains on a "
        "part of the corpus",
        "trainer.limit_test_batches": "python -m bitnet_lit.evaluate measures the whole validation split",
        "trainer.check_val_every_n_epoch": "trainer.val_check_interval=1.0 validates once an epoch",
        "trainer.default_root_dir": "hydra.run.dir=<folder> is the run folder",
        "trainer.min_epochs": _LENGTH,
        "trainer.min_steps": _LENGTH,
        "trainer.callbacks": "callbacks are callbacks.extra.<name>._target_=<class>",
        "trainer.logger": "loggers are logger.extra.<name>._target_=<class>",
        "trainer.enable_checkpointing": _CHECKPOINTS,
        "trainer.enable_progress_bar": _BAR,
        "trainer.num_sanity_val_steps": "mode=smoke tries a whole run in seconds",
        "trainer.gradient_clip_algorithm": "gradients are clipped by their norm: trainer.gradient_clip_val=<norm>",
        "trainer.use_distributed_sampler": "the order of the data does not depend on the number of devices",
        "trainer.reload_dataloaders_every_n_epochs": "the data has no end, so it is opened once",
        "trainer.barebones": "callbacks=quiet callbacks.throughput=false callbacks.ternary_health=false cost no time",
        "paths.data_dir": "it is data.dir=<folder of shards>",
        "paths": "the paths are data.dir=<folder of shards> and hydra.run.dir=<run folder>",
        "task_name": _NAME,
        **dict.fromkeys(("name", "run_name"), _NAME),
        "tags": f"{_NAME}; logger.wandb_group=<name> groups runs",
        "hparams_search": "a sweep is -m key=a,b,c, a search -m sweep=optuna_lr, or a file of your own: sweep=<name>",
        "test": "python -m bitnet_lit.evaluate checkpoint=<run folder> measures the whole validation split",
        "optimized_metric": "it is sweep.metric=val/loss",
        "dry_run": "it is sweep.dry_run=true",
        "extras": "--cfg job prints the config",
        "callbacks.early_stopping": _EARLY,
        "callbacks.model_checkpoint": _CHECKPOINTS,
        "callbacks.rich_progress_bar": _BAR,
        "callbacks.model_summary": "the plan is printed; trainer.extra.enable_model_summary=true adds Lightning's",
        "logger.mlflow": "logger=mlflow gives logger.extra.mlflow.<key>",
        "logger.comet": "it is logger.extra.comet._target_=lightning.pytorch.loggers.CometLogger",
        "logger.neptune": "it is logger.extra.neptune._target_=lightning.pytorch.loggers.NeptuneLogger",
        "optim.lr": "it is optim.learning_rate",
    },
    "evaluate": {
        "ckpt_path": _CHECKPOINT,
        "data.dir": "it is data_dir=<folder of shards>",
        "engine": _ENGINE,
        "device": _ENGINE,
    },
    "infer": {
        "ckpt_path": _CHECKPOINT,
        "do_sample": "temperature=0 takes the likeliest token, and a larger temperature draws one",
        "num_beams": "there is no beam search: temperature=0 takes the likeliest token",
    },
    "export": {"ckpt_path": _CHECKPOINT},
}
_SHARDS = "it is data.dir=<folder of shards>, which python -m bitnet_lit.prepare source={} writes"
# The same for options of groups.
OPTION_WORDS = {
    **dict.fromkeys(("quant=bitnet", "quant=bitnet_b158", "quant=ternary"), "quant=b158 is BitNet b1.58"),
    **dict.fromkeys(("quant=binary", "quant=1bit"), "quant=b1 has weights of one bit"),
    **dict.fromkeys(
        (f"quant={name}" for name in ("dense", "full", "float", "fp32", "fp16", "bf16", "false", "null")),
        "quant=none trains the dense twin",
    ),
    **{f"data={name}": _SHARDS.format(name) for name in ("demo", "tinystories")},
    "optim=sgd": "it is optim._target_=torch.optim.SGD",
    "trainer=cuda": "it is trainer=gpu",
    "mode=debug": _SMOKE,
    "mode=train": "mode=full is the whole run, and the default",
    **{f"experiment={name}": f"it is mode={name}" for name in ("smoke", "overfit", "profile")},
    "logger=tb": "it is logger=tensorboard",
    **dict.fromkeys(
        ("logger=none", "logger=false", "logger=null"), "metrics.csv is always written, and logger=csv writes no more"
    ),
    "callbacks=early_stopping": _EARLY,
    "callbacks=model_checkpoint": _CHECKPOINTS,
    **dict.fromkeys(
        ("callbacks=none", "callbacks=off", "callbacks=false", "callbacks=null"), "callbacks=quiet prints nothing"
    ),
    "logger=comet": WORDS["train"]["logger.comet"],
    "logger=neptune": WORDS["train"]["logger.neptune"],
    "logger=many_loggers": "it is logger=many",
}
PATH_KEYS = {"data": "data.dir", "model": "init_from"}
"""Groups for which a path is typed (train data=data/mine) -> the key that takes the path."""

# Keys and flags for which another tool's name says another key here, by the command.
_MODEL = dict.fromkeys(("model", "model_path", "model_name_or_path", "m"), "checkpoint")
_OUT = ("output", "output_dir", "out_dir", "save_dir", "o")
_RUNS = dict.fromkeys(("input", "i", "data", "logdir", "sweep", "run"), "runs")
KEYS = {
    "train": dict.fromkeys(("out", *_OUT), "hydra.run.dir")
    | dict.fromkeys(("data", "data_path"), "data.dir")
    | dict.fromkeys(("scheme", "quantize", "quantization"), "quant"),
    "prepare": dict.fromkeys(_OUT, "out")
    | dict.fromkeys(("input", "i", "data", "data_dir", "dataset"), "source")
    | {"vocab": "vocab_size"},
    "evaluate": _MODEL | dict.fromkeys(("file", "files", "text", "input", "i", "f"), "data"),
    "infer": _MODEL  # letters as in llama.cpp
    | dict.fromkeys(("text", "p", "i"), "prompt")
    | dict.fromkeys(("n", "predict", "n_predict"), "max_new_tokens")
    | dict.fromkeys(("file", "f", "prompt_file", "prompts_file", "input_file"), "prompts")
    | {"t": "threads", "temp": "temperature", "s": "seed"},
    "export": _MODEL | dict.fromkeys(_OUT, "out") | {"f": "format", "outtype": "type"},
    "report": _RUNS | dict.fromkeys(_OUT, "out"),
    "plot": _RUNS | dict.fromkeys(_OUT, "out"),
    "bench": {"t": "threads"},
}

_FORCE, _VERBOSE = ("force", "overwrite", "yes"), ("verbose", "log_level")
_VERSION = {"V": "it is --version"}
_OF_ALL = {
    **dict.fromkeys((*_VERBOSE, "debug"), "it has no levels: a command says all that it does"),
    **dict.fromkeys(_FORCE, "no command asks: where it refuses a folder, give another one"),
    "quiet": "2>/dev/null leaves out what a command says beside its result",
    "dry_run": "only train has one: sweep.dry_run=true",
    "config": "keys are typed as key=value; only train reads a file of them, by experiment=<name>",
    **_VERSION,
}
# Flags of other tools that are no key here, by the command, and what to type instead.
FLAGS = {
    **dict.fromkeys(("prepare", "evaluate", "export", "report", "plot", "bench"), _OF_ALL),
    "infer": _OF_ALL
    | dict.fromkeys(("c", "ctx_size"), "the context is the model's own; max_new_tokens=<number> limits the text"),
    "train": {
        **dict.fromkeys(_VERBOSE, "a run prints its plan and its losses; metrics.csv in its folder has all figures"),
        **dict.fromkeys(_FORCE, "a run never replaces another one: give a new folder, hydra.run.dir=<folder>"),
        **dict.fromkeys(("cpu", "gpu", "cuda", "mps"), "it is trainer.accelerator=gpu, cpu or mps"),
        **dict.fromkeys(("bf16", "fp16", "amp"), "it is trainer.precision=bf16-mixed"),
        "fp32": "it is trainer.precision=32-true",
        **dict.fromkeys(
            ("temperature", "temp", "top_k", "top_p"),
            "python -m bitnet_lit.infer has temperature=, top_k= and top_p=; a teacher's is distill.temperature=",
        ),
        "format": "python -m bitnet_lit.export format=<format> writes it from a run; export.targets=[<format>] checks "
        "before a run that it can",
        **dict.fromkeys(("checkpoint", "ckpt"), WORDS["train"]["ckpt_path"]),
        "quiet": "callbacks=quiet leaves out the progress bar and the sample texts",
        "device": "trainer.accelerator=gpu, cpu or mps is the device, trainer.devices=<number> how many of it",
        "config": "a file of keys is <folder>/experiment/<name>.yaml: --config-dir <folder> experiment=<name>",
        "wandb": "it is logger=wandb",
        "prompt": "python -m bitnet_lit.infer continues a prompt; callbacks.sample_prompts=[<text>] does in a run",
        **_VERSION,
    },
}
SPELLINGS = {
    **dict.fromkeys(("q", "silent"), "quiet"),
    **dict.fromkeys(("v", "vv", "loglevel"), "verbose"),
    "c": "config",
    "y": "yes",
    "d": "debug",
}
"""Other spellings of flags, such as the letters that most tools share."""
