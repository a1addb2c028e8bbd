// How far scopes look: the numbers, and rings around a token that show them.

// The mean distance from a token's place to what it read in a scope, in widths of the picture.
function reachOf(picture, scope, token) {
  const {patches, patch_grid: [rows, columns], places, shares, width, height} = picture, [y, x] = places[token];
  let reach = 0;
  for (let patch = 0; patch < patches; patch++) {
    const down = (Math.floor(patch / columns) + 0.5) / rows - y, right = (patch % columns + 0.5) / columns - x;
    reach += shares[(scope * picture.tokens + token) * patches + patch] * Math.hypot(right, down * height / width);
  }
  return reach;
}

// Of all tokens: an array for each scope.
function reaches(picture) {
  return [...Array(picture.scopes).keys()].map(scope => Float32Array.from({length: picture.tokens}, (_, token) => reachOf(picture, scope, token)));
}

function averageOf(numbers, ofTokens) {
  return numbers.reduce((total, value, token) => total + value * ofTokens[token], 0);
}

// How widely tokens looked in a scope, in bits: the mean entropy of what each read.
function entropyOf(picture, scope, ofTokens) {
  const {tokens, patches, shares} = picture;
  return averageOf(Float32Array.from({length: tokens}, (_, token) => {
    const begin = (scope * tokens + token) * patches;
    return -sum(shares.slice(begin, begin + patches).map(share => share && share * Math.log2(share)));
  }), ofTokens);
}

function paintRing(canvas, [y, x], reach, colour, paper) {
  const context = canvas.getContext('2d');
  context.beginPath();
  context.arc(x * canvas.width, y * canvas.height, reach * canvas.width, 0, 2 * Math.PI);
  [[paper, 7], [colour, 4]].forEach(([strokeStyle, lineWidth]) => {
    Object.assign(context, {strokeStyle, lineWidth});
    context.stroke();
  });
}

// The number of a ring on its line, where there is room: below the token, or turned from there, a bit for each scope.
function paintReach(canvas, [y, x], reach, colour, look, turn) {
  const wide = 58, tall = 28;
  const spots = [...Array(24).keys()].map(step => {
    const angle = (turn + (step % 2 ? -1 : 1) * Math.ceil(step / 2) / 24) * 2 * Math.PI;
    return [x * canvas.width + Math.cos(angle) * reach * canvas.width, y * canvas.height + Math.sin(angle) * reach * canvas.width];
  });
  const inside = ([left, top]) => left > wide / 2 && left < canvas.width - wide / 2 && top > tall / 2 && top < canvas.height - tall / 2;
  paintLabel(canvas, reach.toFixed(2), spots.find(inside) || spots[0], colour, look);
}

// A text around a point, but not beyond the left edge.
function paintLabel(canvas, text, [x, y], colour, {paper, ink}) {
  const context = canvas.getContext('2d');
  Object.assign(context, {fillStyle: paper, strokeStyle: colour, lineWidth: 2, font: '600 21px system-ui', textAlign: 'center', textBaseline: 'middle'});
  const wide = context.measureText(text).width + 14, tall = 28, middle = Math.max(x, wide / 2 + 6);
  context.beginPath();
  context.roundRect(middle - wide / 2, y - tall / 2, wide, tall, 6);
  context.fill();
  context.stroke();
  context.fillStyle = ink;
  context.fillText(text, middle, y + 1);
}
