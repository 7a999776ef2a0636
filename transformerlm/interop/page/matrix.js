// Products with matrices of 8 bits: what nearly all of the time goes to.
//
// A matrix has `levels`, whole numbers from -127 to 127, row after row, and a scale for each row. It is multiplied as
// transformerlm-infer does it with precision = "int8": one vector in full precision; several, the ids of a prompt, with
// vectors and products rounded to bfloat16.

const BITS = new Uint32Array(1);
const NUMBER = new Float32Array(BITS.buffer);
const MOST_AT_ONCE = 16; // up to so many rows the scale is applied before the product is rounded
const BLOCK = 32;

// Return a number as bfloat16: the upper 16 bits of its float32, rounded to the nearest, of two to the even one.
export function narrowed(value) {
  NUMBER[0] = value;
  const bits = BITS[0];
  BITS[0] = (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000;
  return NUMBER[0];
}

// Return `count` rows of `x` (a Float32Array) times a matrix, as a Float32Array of `count` rows.
export function multiply(matrix, x, count) {
  return count === 1 ? multiplyOne(matrix, x) : multiplyMany(matrix, x, count);
}

function multiplyOne({ levels, scales, width }, x) {
  const height = scales.length;
  const product = new Float32Array(height);
  const vector = Float64Array.from(x); // the sums are of this type: nothing is converted in the loop
  let row = 0;
  for (; row + 4 <= height; row += 4) {
    const a = row * width, b = a + width, c = b + width, d = c + width;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
    for (let at = 0; at < width; at++) {
      const value = vector[at];
      sumA += value * levels[a + at];
      sumB += value * levels[b + at];
      sumC += value * levels[c + at];
      sumD += value * levels[d + at];
    }
    product[row] = Math.fround(sumA) * scales[row];
    product[row + 1] = Math.fround(sumB) * scales[row + 1];
    product[row + 2] = Math.fround(sumC) * scales[row + 2];
    product[row + 3] = Math.fround(sumD) * scales[row + 3];
  }
  for (; row < height; row++) {
    let sum = 0;
    for (let at = 0; at < width; at++) sum += vector[at] * levels[row * width + at];
    product[row] = Math.fround(sum) * scales[row];
  }
  return product;
}

function multiplyMany({ levels, scales, width }, x, count) {
  const height = scales.length;
  const product = new Float32Array(count * height);
  const roundsOnce = count <= MOST_AT_ONCE && width % BLOCK === 0;
  const finish = (sum, scale) => narrowed((roundsOnce ? Math.fround(sum) : narrowed(sum)) * scale);
  const vectors = new Float64Array(4 * width);
  for (let first = 0; first < count; first += 4) {
    const taken = Math.min(4, count - first);
    vectors.fill(0);
    for (let at = 0; at < taken * width; at++) vectors[at] = narrowed(x[first * width + at]);
    for (let row = 0; row < height; row++) {
      const start = row * width;
      let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
      for (let at = 0; at < width; at++) {
        const level = levels[start + at];
        sumA += level * vectors[at];
        sumB += level * vectors[at + width];
        sumC += level * vectors[at + 2 * width];
        sumD += level * vectors[at + 3 * width];
      }
      const sums = [sumA, sumB, sumC, sumD];
      for (let each = 0; each < taken; each++) product[(first + each) * height + row] = finish(sums[each], scales[row]);
    }
  }
  return product;
}
