// Numbers and paint of the scope view: what a selection of tokens read, and how that looks on a canvas.
// A picture has S scopes, M visual tokens and N patches; weights is S x M, shares S x M x N, both in one row. Of a
// picture in tiles, the first tokens are the overview's: `overview` is their number.

const CANVAS_PIXELS = 384;

async function unpack(text, Numbers) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Numbers(await new Response(stream).arrayBuffer());
}

// Rows of shares, from steps of 1/65535 of the row's peak.
async function unpackRows(packed) {
  const peaks = await unpack(packed.peaks, Float32Array), steps = await unpack(packed.steps, Uint16Array);
  const width = steps.length / peaks.length;
  return Float32Array.from(steps, (step, place) => step / 65535 * peaks[Math.floor(place / width)]);
}

// The grid of a token, and its number there.
function gridOf({token_grid, overview_grid, overview}, token) {
  return token < overview ? [overview_grid, token] : [token_grid, token - overview];
}

function sum(numbers) {
  return numbers.reduce((total, value) => total + value, 0);
}

function normalised(numbers) {
  const total = sum(numbers);
  return total > 0 ? numbers.map(value => value / total) : numbers;
}

function largest(numbers) {
  return numbers.reduce((best, value) => Math.max(best, Math.abs(value)), 0);
}

// How much a picture's tokens have to do with a selection: (M), sums to one.
function tokenShares(picture, selection) {
  const {tokens, patches, scopes, weights, shares} = picture;
  if (selection.kind === 'token') return new Float32Array(tokens).fill(0).fill(1, selection.token, selection.token + 1);
  if (selection.kind === 'word') return normalised(selection.shares);
  const all = new Float32Array(tokens).fill(1 / tokens);
  if (selection.kind !== 'place') return all;
  const readers = all.map((_, token) => {
    let read = 0;
    for (let scope = 0; scope < scopes; scope++) {
      const row = scope * tokens + token;
      read += weights[row] * shares[row * patches + selection.patch];
    }
    return read;
  });
  return normalised(readers);
}

// The trust that tokens put in a scope; or what is usual.
function trustIn(picture, scope, ofTokens, trusts = picture.weights) {
  return averageOf(trusts.slice(scope * picture.tokens, (scope + 1) * picture.tokens), ofTokens);
}

// Where tokens looked in a scope; `trusted` counts each as much as it trusted that scope. (N)
function scopeMap(picture, scope, ofTokens, trusted = false) {
  const {tokens, patches, weights, shares} = picture, map = new Float32Array(patches);
  for (let token = 0; token < tokens; token++) {
    const row = scope * tokens + token, factor = ofTokens[token] * (trusted ? weights[row] : 1);
    if (factor) for (let patch = 0; patch < patches; patch++) map[patch] += factor * shares[row * patches + patch];
  }
  return map;
}

// Where tokens looked in all scopes, each as far as they trusted it. (N)
function fusedMap(picture, ofTokens) {
  const map = new Float32Array(picture.patches);
  for (let scope = 0; scope < picture.scopes; scope++) {
    scopeMap(picture, scope, ofTokens, true).forEach((value, patch) => { map[patch] += value; });
  }
  return map;
}

// The same for tokens whose attention is not known: each is taken to read its own cell. (N)
function cellMap({patches, patch_grid: [rows, columns], token_grid, overview_grid, overview}, ofTokens) {
  const map = new Float32Array(patches);
  for (const [[tall, wide], first] of [[overview_grid, 0], [token_grid, overview]]) {
    const cells = tall * wide / patches;
    if (tall) map.forEach((_, patch) => {
      const row = Math.floor(Math.floor(patch / columns) * tall / rows), column = Math.floor(patch % columns * wide / columns);
      map[patch] += ofTokens[first + row * wide + column] * cells;
    });
  }
  return map;
}

function newCanvas(width, height) {
  return Object.assign(document.createElement('canvas'), {width, height});
}

// The picture in faint greys, under a heat map; what is too dark for light paper, or the reverse, becomes a negative.
function faintGrey(image, width, height, darkPaper) {
  const canvas = newCanvas(width, height), context = canvas.getContext('2d');
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height), data = pixels.data, grey = new Float32Array(width * height);
  for (let i = 0; i < grey.length; i++) grey[i] = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
  const darkPicture = sum(grey) < 127 * grey.length, lowest = darkPaper ? 25 : 125;
  grey.forEach((value, i) => {
    const kept = darkPicture === darkPaper ? value : 255 - value;
    data.fill(lowest + (darkPaper ? 0.4 : 0.5) * kept, 4 * i, 4 * i + 3);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// What a map has more, or less, than the mean of others.
function difference(map, others) {
  return map.map((value, patch) => value - others.reduce((total, other) => total + other[patch], 0) / others.length);
}

// The patches that hold half of a map, the most read first.
function mostRead(map) {
  const order = [...map.keys()].sort((a, b) => map[b] - map[a]), half = sum(map) / 2, most = [];
  for (let held = 0; held < half && order.length; held += map[most.at(-1)]) most.push(order.shift());
  return most;
}

// A map over its grid, the more the less transparent: in one colour, and in another where it is negative. By square
// roots, so that what is spread thin is seen beside what is not.
function heatCanvas(map, [rows, columns], peak, colours) {
  const canvas = newCanvas(columns, rows), context = canvas.getContext('2d'), pixels = context.createImageData(columns, rows);
  const channels = colours.map(colour => [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16)));
  map.forEach((value, i) => pixels.data.set([...channels[value < 0 ? 1 : 0], 255 * Math.sqrt(Math.abs(value) / (peak || 1))], 4 * i));
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// mode: picture, overlay, heat or difference; opacity from 0 to 1; paper, ink: the page's colours; peak: of the scale.
function paintMap(canvas, picture, map, colour, peak, {mode, opacity, paper, ink, dark}) {
  const context = canvas.getContext('2d'), whole = [0, 0, canvas.width, canvas.height];
  context.fillStyle = paper;
  context.fillRect(...whole);
  if (mode === 'picture') return context.drawImage(picture.image, ...whole);
  if (mode !== 'heat') context.drawImage(dark ? picture.darkGrey : picture.lightGrey, ...whole);
  context.imageSmoothingQuality = 'high';
  context.globalAlpha = opacity;
  context.drawImage(heatCanvas(map, picture.patch_grid, peak, [colour, ink]), ...whole);
  context.globalAlpha = 1;
}

// The most likely word of each token in its cell, the surer the stronger; the background is left out.
function paintTokenWords(canvas, {words}, [[rows, columns], first], {ink, paper}) {
  const context = canvas.getContext('2d'), width = canvas.width / columns, height = canvas.height / rows;
  Object.assign(context, {textAlign: 'center', textBaseline: 'middle'});
  context.font = `${Math.max(9, Math.min(15, width / 4.5))}px system-ui`;
  words.slice(first, first + rows * columns).forEach(([[word, share] = ['background', 0]], token) => {  // a token that was dropped says nothing
    if (word === 'background' || share < 0.15) return;
    const [left, middle] = [(token % columns + 0.5) * width, (Math.floor(token / columns) + 0.5) * height];
    const wide = Math.min(width - 4, context.measureText(word).width + 6);
    Object.assign(context, {fillStyle: paper, globalAlpha: Math.min(0.9, 0.5 + share)});
    context.fillRect(left - wide / 2, middle - 9, wide, 18);
    Object.assign(context, {fillStyle: ink, globalAlpha: 1});
    context.fillText(word, left, middle, wide - 4);
  });
  context.globalAlpha = 1;
}

// A mark around a cell of a grid, visible on any ground.
function paintFrame(canvas, [rows, columns], cell) {
  const context = canvas.getContext('2d'), width = canvas.width / columns, height = canvas.height / rows;
  const left = cell % columns * width, top = Math.floor(cell / columns) * height;
  [['#fff', 5], ['#111', 2.5]].forEach(([colour, line]) => {
    Object.assign(context, {strokeStyle: colour, lineWidth: line});
    context.strokeRect(left + 2, top + 2, Math.max(width - 4, 1), Math.max(height - 4, 1));
  });
}

// Stripes over patches that are covered.
function paintCover(canvas, [rows, columns], patches) {
  const context = canvas.getContext('2d'), width = canvas.width / columns, height = canvas.height / rows;
  patches.forEach(patch => {
    const left = patch % columns * width, top = Math.floor(patch / columns) * height;
    context.fillStyle = '#8c8c8c';
    context.fillRect(left, top, width, height);
    Object.assign(context, {strokeStyle: '#fff', lineWidth: 1.5});
    context.beginPath();
    context.moveTo(left, top + height);
    context.lineTo(left + width, top);
    context.stroke();
  });
}

// For each token the scope that it trusts most above what is usual for it, and how far above.
function trustAboveUsual({tokens, scopes, weights, usual}) {
  return [...Array(tokens).keys()].map(token => {
    const above = Array.from({length: scopes}, (_, scope) => weights[scope * tokens + token] - usual[scope * tokens + token]);
    const scope = above.indexOf(Math.max(...above));
    return {scope, above: above[scope]};
  });
}

// A grid of tokens, which begins at one. Of a place or a word, by the shares of its tokens; else by what each token trusts
// more than it usually does.
function paintTokens(canvas, picture, [[rows, columns], first], ofTokens, byShare, colours, fused, {paper, ink}) {
  const context = canvas.getContext('2d'), most = trustAboveUsual(picture);
  const width = canvas.width / columns, height = canvas.height / rows, gap = Math.min(4, width / 8);
  const byTrust = picture.scopes > 1 && !byShare, values = byTrust ? most.map(one => one.above) : [...ofTokens];
  const peak = largest(values) || 1;
  context.fillStyle = paper;
  context.fillRect(0, 0, canvas.width, canvas.height);
  values.slice(first, first + rows * columns).forEach((value, cell) => {
    const left = cell % columns * width + gap / 2, top = Math.floor(cell / columns) * height + gap / 2, token = first + cell;
    context.fillStyle = byTrust ? colours[most[token].scope] : byShare ? fused : ink;
    context.globalAlpha = (0.1 + 0.9 * (value / peak)) * (picture.kept?.includes(token) ?? true);  // what is dropped is empty
    context.fillRect(left, top, width - gap, height - gap);
  });
  context.globalAlpha = 1;
}
