// Products with matrices of 8 bits: what nearly all of the time goes to.
//
// A matrix has groups of columns, `size` each; the last may be filled up with zeros. A group has `levels`, whole numbers
// from -127 to 127, row after row, and a scale for each row. It is multiplied as transformerlm-infer does it with
// precision = "int8": one vector in full precision; several, the ids of a prompt, with vectors and products rounded to
// bfloat16, and where there are many vectors and groups the weights as well.

const BITS = new Uint32Array(1);
const NUMBER = new Float32Array(BITS.buffer);
const MOST_AT_ONCE = 16; // up to so many vectors a sum is not rounded before it is scaled

// Return a number as bfloat16: the upper 16 bits of its float32, rounded to the nearest, of two to the even one.
export function narrowed(value) {
  NUMBER[0] = value;
  const bits = BITS[0];
  BITS[0] = (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000;
  return NUMBER[0];
}

// Return `count` rows of `x` (a Float32Array) times a matrix, as a Float32Array of `count` rows.
export function multiply({ levels, scales, size }, x, count) {
  const width = x.length / count;
  const number = Math.ceil(width / size);
  const height = scales.length / number;
  const groups = Array.from({ length: number }, (_, group) => ({
    levels: levels.subarray(group * height * size, (group + 1) * height * size),
    scales: scales.subarray(group * height, (group + 1) * height),
    vectors: columns(x, count, group * size, size),
  }));
  if (count === 1) return sumOf(groups.map(multiplyOne));
  for (const { vectors } of groups) vectors.forEach((value, at) => (vectors[at] = narrowed(value)));
  if (count > MOST_AT_ONCE && number > 1) return multiplyWidened(groups, count);
  return sumOf(groups.map((group) => multiplySeveral(group, count)));
}

// Return `size` columns of the rows of x from one on, and zeros after the last; several rows are filled up to fours.
function columns(x, count, from, size) {
  const width = x.length / count;
  const to = Math.min(from + size, width);
  const part = new Float64Array((count === 1 ? 1 : 4 * Math.ceil(count / 4)) * size); // of the sums' type
  for (let row = 0; row < count; row++) part.set(x.subarray(row * width + from, row * width + to), row * size);
  return part;
}

function sumOf([sum, ...others]) {
  for (const other of others) other.forEach((value, at) => (sum[at] += value));
  return sum;
}

function multiplyOne({ levels, scales, vectors: vector }) {
  const height = scales.length, size = vector.length;
  const product = new Float32Array(height);
  let row = 0;
  for (; row + 4 <= height; row += 4) {
    const a = row * size, b = a + size, c = b + size, d = c + size;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
    for (let at = 0; at < size; at++) {
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
    for (let at = 0; at < size; at++) sum += vector[at] * levels[row * size + at];
    product[row] = Math.fround(sum) * scales[row];
  }
  return product;
}

function multiplySeveral({ levels, scales, vectors }, count) {
  const sums = new Float64Array(count * scales.length);
  addProducts(sums, levels, vectors, count);
  const rounded = count > MOST_AT_ONCE ? narrowed : Math.fround;
  return Float32Array.from(sums, (sum, at) => narrowed(rounded(sum) * scales[at % scales.length]));
}

function multiplyWidened(groups, count) {
  const height = groups[0].scales.length;
  const sums = new Float64Array(count * height);
  for (const { levels, scales, vectors } of groups) {
    const size = levels.length / height;
    const weights = Float32Array.from(levels, (level, at) => narrowed(level * scales[Math.floor(at / size)]));
    addProducts(sums, weights, vectors, count);
  }
  return Float32Array.from(sums, narrowed);
}

// Add the products of a matrix's rows with `count` vectors to sums.
function addProducts(sums, matrix, vectors, count) {
  const height = sums.length / count, size = matrix.length / height;
  for (let first = 0; first < count; first += 4) {
    const a = first * size, b = a + size, c = b + size, d = c + size;
    const taken = Math.min(4, count - first);
    for (let row = 0; row < height; row++) {
      const start = row * size;
      let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
      for (let at = 0; at < size; at++) {
        const weight = matrix[start + at];
        sumA += weight * vectors[a + at];
        sumB += weight * vectors[b + at];
        sumC += weight * vectors[c + at];
        sumD += weight * vectors[d + at];
      }
      const found = [sumA, sumB, sumC, sumD];
      for (let each = 0; each < taken; each++) sums[(first + each) * height + row] += found[each];
    }
  }
}
