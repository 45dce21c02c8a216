// Node: sharp decodes, photo.mjs resizes, ONNX Runtime Web answers.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import sharp from "sharp";

const [folder, photos] = [process.argv[2], JSON.parse(process.argv[3])];
const { pixels } = await import(`${folder}/photo.mjs`);
const { image } = JSON.parse(readFileSync(`${folder}/classes.json`));
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(`${folder}/model.onnx`));
const rows = [];
for (const path of photos) {
  const decoding = sharp(path, { ignoreIcc: true }).rotate().toColourspace("srgb").raw();
  const { data, info } = await decoding.toBuffer({ resolveWithObject: true });
  const tensor = new ort.Tensor("float32", pixels({ data, ...info }, image), [1, image.size, image.size, 3]);
  rows.push(Array.from((await session.run({ image: tensor })).probabilities.data));
}
console.log(JSON.stringify(rows));
