"""This package turns text into tokens, and tokens into batches.

`sources/` reads stories, `tokenizers/` turns them into token ids, and `prepare.py` writes the ids into a folder of
shards (`shard_folder.py`). `shards.py` opens such a folder, `token_split.py` cuts it into sequences, `order.py` says
which sequence comes when, and `datamodule.py` makes batches of them for Lightning.
"""
