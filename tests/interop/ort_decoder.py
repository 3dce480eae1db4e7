"""Run where optimum is: `python ort_decoder.py FOLDER IN.json`. Loads the folder as its users do, and prints what it
writes greedily after a batch of prompts that are padded on the left.
"""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True, use_io_binding=False)
ids, mask = torch.tensor(asked["ids"]), torch.tensor(asked["mask"])
written = model.generate(
    ids, attention_mask=mask, max_new_tokens=asked["steps"], do_sample=False, eos_token_id=None, pad_token_id=0
)
print(json.dumps(written[:, ids.shape[1] :].tolist()))
