"""Run where optimum is: `python ort_model.py FOLDER IN.npz OUT.npz`. Loads the folder as its users do."""

import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoImageProcessor

folder, inputs, outputs = sys.argv[1:]
model = ORTModelForFeatureExtraction.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
stored = np.load(inputs)
found = {}
for name in stored.files:
    if name.startswith("photo"):
        pixels = processor(stored[name], return_tensors="np")["pixel_values"]
        found[f"{name}/pixels"] = pixels
    else:
        pixels = stored[name]
    answer = model(pixel_values=torch.from_numpy(pixels))
    found[f"{name}/last_hidden_state"] = answer["last_hidden_state"].numpy()
np.savez(outputs, **found)
