// node transformers_js.mjs FOLDER PIXELS.f32 B H W OUT.f32: loads the folder as transformers.js's users do.
import { AutoModel, AutoProcessor, Tensor, RawImage, env } from "@huggingface/transformers";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, basename } from "node:path";

const [folder, input, batch, height, width, output] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const name = basename(folder);
const model = await AutoModel.from_pretrained(name, { subfolder: "", dtype: "fp32" });
const raw = readFileSync(input);
const pixels = new Float32Array(raw.buffer, raw.byteOffset, raw.byteLength / 4);
const shape = [Number(batch), 3, Number(height), Number(width)];
const answer = await model({ pixel_values: new Tensor("float32", pixels, shape) });
const tokens = answer.last_hidden_state;
writeFileSync(output, Buffer.from(Float32Array.from(tokens.data).buffer));
const processor = await AutoProcessor.from_pretrained(name);
const prepared = await processor(new RawImage(new Uint8ClampedArray(300 * 200 * 3).fill(90), 300, 200, 3));
console.log(JSON.stringify({ tokens: tokens.dims, pooled: answer.pooler_output.dims, prepared: prepared.pixel_values.dims,
  value: prepared.pixel_values.data[0] }));
