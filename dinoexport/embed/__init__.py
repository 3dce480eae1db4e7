"""Embed images into Parquet files with a validated bundle: on one machine, as jobs of any scheduler, or on Ray.

    OUT/part-00012-of-00064.parquet   the rows of one shard, complete or absent
    OUT/_plan/0/plan.json             what is embedded and how; written first and once
    OUT/_plan/0/00012.jsonl           the shard's items: name and size, a JSON array a line
    OUT/_plan/0/00012.done.json       rows, failures and SHA-256 of the finished shard
    OUT/_plan/1/...                   what --extend added
    OUT/_SUCCESS.json                 when everything is done: counts and the hash of every part

A shard is done when its part has its final name. Only the plan determines its content, so two workers that do the same
shard write the same bytes, and no lock is needed. Readers of Parquet skip names that begin with `_`.
"""
