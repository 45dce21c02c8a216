// A photo as the model wants it: RGB pixels of a square, made as for the training of the model. For browsers and Node.
//
//     import { decoded, pixels } from "./photo.mjs";
//
//     const { image } = await (await fetch("classes.json")).json();
//     const data = pixels(await decoded(file), image);               // browsers; `file` is a File, a Blob or a Response
//     const tensor = new ort.Tensor("float32", data, [1, image.size, image.size, 3]);
//
// Node decodes no photos by itself; with sharp (https://sharp.pixelplumbing.com):
//
//     const { data, info } = await sharp(path, { ignoreIcc: true }).rotate().raw().toBuffer({ resolveWithObject: true });
//     const input = pixels({ data, ...info }, image);
//
// `finetune export` puts this file beside every model. Resizing gives the pixels of Pillow, which training uses, bit for bit.
// Decoders differ: training decodes large JPEG files at a fraction of their size, which no browser does.

/** A photo file -> {data, width, height}: RGBA, upright, on white where it is transparent. In browsers only. */
export async function decoded(file) {
  const blob = typeof file.blob === "function" ? await file.blob() : file;
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height };
}

/**
 * Decoded pixels of any size -> Float32Array of size * size * 3 numbers, RGB from 0 to 255.
 *
 * picture: {data, width, height}, where data holds 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA) bytes a pixel.
 * image: what classes.json says under that name: {size, resize, max_pixels}. Throws a RangeError for a picture that is
 * too large, or whose data do not fit its size.
 */
export function pixels({ data, width, height }, { size, resize, max_pixels: most }) {
  const channels = data.length / (width * height);
  if (![1, 2, 3, 4].includes(channels)) throw new RangeError(`${data.length} bytes for ${width} x ${height} pixels`);
  if (width * height > most) throw new RangeError(`${width} x ${height} pixels are more than ${most}`);
  const { box, target } = geometry(width, height, size, resize);
  const shrinks = box[2] - box[0] >= target[0] && box[3] - box[1] >= target[1];
  let picture = { data: rgb(data, channels), width, height };
  if (width !== target[0] || height !== target[1]) picture = resized(picture, box, target, shrinks ? HAMMING : BICUBIC);
  const result = new Float32Array(size * size * 3);
  const left = (size - picture.width) >> 1;
  const top = (size - picture.height) >> 1;
  for (let y = 0; y < picture.height; y++) {
    const row = picture.data.subarray(y * picture.width * 3, (y + 1) * picture.width * 3);
    result.set(row, ((top + y) * size + left) * 3);
  }
  return result;
}

/** The part that is used (left, top, right, bottom), and its width and height afterwards. */
function geometry(width, height, size, resize) {
  if (resize === "crop") {
    const side = Math.min(width, height);
    const left = (width - side) / 2;
    const top = (height - side) / 2;
    return { box: [left, top, left + side, top + side], target: [size, size] };
  }
  if (resize === "squash") return { box: [0, 0, width, height], target: [size, size] };
  const scale = size / Math.max(width, height);
  const lengths = [width, height].map((length) => Math.max(1, halfToEven(length * scale)));
  return { box: [0, 0, width, height], target: lengths };
}

function halfToEven(number) {
  const rounded = Math.round(number);
  return rounded - number === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** Three bytes a pixel; transparent ones are laid on white. */
function rgb(data, channels) {
  if (channels === 3) return data;
  const count = data.length / channels;
  const result = new Uint8Array(count * 3);
  for (let i = 0; i < count; i++) {
    const alpha = channels % 2 ? 255 : data[i * channels + channels - 1];
    for (let c = 0; c < 3; c++) {
      const value = data[i * channels + (channels > 2 ? c : 0)];
      result[i * 3 + c] = Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return result;
}

// Hamming's window times sinc, and Keys' cubic convolution with a = -1/2 (https://doi.org/10.1109/TASSP.1981.1163711).
const HAMMING = {
  reach: 1,
  share: (x) => (x === 0 ? 1 : x >= 1 ? 0 : (Math.sin(Math.PI * x) / (Math.PI * x)) * (0.54 + 0.46 * Math.cos(Math.PI * x))),
};
const BICUBIC = {
  reach: 2,
  share: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0),
};
// Shares are whole numbers of this fraction, as in Pillow.
const UNIT = 2 ** 22;

/** `picture` resized as Pillow's Image.resize(target, filter, box, reducing_gap=3) does it. */
function resized(picture, box, target, filter) {
  const scales = [(box[2] - box[0]) / target[0], (box[3] - box[1]) / target[1]];
  const blocks = scales.map((scale) => Math.max(1, Math.trunc(scale / 3)));
  if (blocks[0] > 1 || blocks[1] > 1) {
    const margins = scales.map((scale) => (filter.reach - 0.5) * scale);
    const from = [0, 1].map((i) => Math.max(0, Math.trunc(box[i] - margins[i])));
    const to = [0, 1].map((i) => Math.min([picture.width, picture.height][i], Math.ceil(box[i + 2] + margins[i])));
    picture = blockMeans(picture, from, to, blocks);
    box = box.map((edge, i) => (edge - from[i % 2]) / blocks[i % 2]);
  }
  box = box.map(Math.fround);
  const across = (from) => pass(from, true, shares(from.width, box[0], box[2], target[0], filter));
  const down = (from) => pass(from, false, shares(from.height, box[1], box[3], target[1], filter));
  const taller = picture.height - target[1];
  const downFirst = taller > 0 && taller > 2 * (picture.width - target[0]);
  return downFirst ? across(down(picture)) : down(across(picture));
}

/** The means of blocks of pixels; those at the right and lower edges may be smaller. */
function blockMeans({ data, width }, from, to, [blockWidth, blockHeight]) {
  const columns = Math.ceil((to[0] - from[0]) / blockWidth);
  const rows = Math.ceil((to[1] - from[1]) / blockHeight);
  const result = new Uint8Array(columns * rows * 3);
  for (let row = 0; row < rows; row++) {
    const top = from[1] + row * blockHeight;
    const bottom = Math.min(top + blockHeight, to[1]);
    for (let column = 0; column < columns; column++) {
      const left = from[0] + column * blockWidth;
      const right = Math.min(left + blockWidth, to[0]);
      const count = (bottom - top) * (right - left);
      const sums = [0, 0, 0];
      for (let y = top; y < bottom; y++) {
        for (let i = (y * width + left) * 3; i < (y * width + right) * 3; i += 3) {
          sums[0] += data[i];
          sums[1] += data[i + 1];
          sums[2] += data[i + 2];
        }
      }
      for (let c = 0; c < 3; c++) {
        result[(row * columns + column) * 3 + c] = Math.floor((sums[c] + Math.floor(count / 2)) / count);
      }
    }
  }
  return { data: result, width: columns, height: rows };
}

/** For each new pixel: the first old one that it needs, and the share of that one and of those after it. */
function shares(length, start, end, target, { reach, share }) {
  const scale = (end - start) / target;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: target }, (_, i) => {
    const centre = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * stretch + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, j) => share(Math.abs(first + j - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => Math.sign(weight) * Math.floor((Math.abs(weight) / sum) * UNIT + 0.5)) };
  });
}

/** One pass along the rows (`across`) or down the columns. */
function pass({ data, width, height }, across, lines) {
  const result = { width: across ? lines.length : width, height: across ? height : lines.length };
  const stride = across ? 3 : width * 3;
  result.data = new Uint8Array(result.width * result.height * 3);
  for (let y = 0, out = 0; y < result.height; y++) {
    for (let x = 0; x < result.width; x++) {
      const { first, weights } = lines[across ? x : y];
      const start = across ? (y * width + first) * 3 : (first * width + x) * 3;
      for (let c = 0; c < 3; c++, out++) {
        let sum = UNIT / 2;
        for (let j = 0; j < weights.length; j++) sum += weights[j] * data[start + j * stride + c];
        result.data[out] = Math.min(255, Math.max(0, Math.floor(sum / UNIT)));
      }
    }
  }
  return result;
}
