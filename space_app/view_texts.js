// The sentences of the scope view.

function counted(count, noun, nouns = `${noun}s`) {
  return `${count} ${count === 1 ? noun : nouns}`;
}

function percent(share) {
  return share > 0 && share < 0.01 ? `${(100 * share).toFixed(1)} %` : `${Math.round(100 * share)} %`;
}

// Of an answer: long ones are never likely as a whole.
function chance(probability) {
  if (probability >= 0.01) return percent(probability);
  return probability < 1e-9 ? 'almost 0' : `1 in ${Math.round(1 / probability).toLocaleString('en')}`;
}

function signed(points) {
  const whole = Math.round(100 * points);
  return whole < 0 ? `−${-whole}` : whole > 0 ? `+${whole}` : '±0';
}

function listed(parts) {
  return parts.length < 2 ? parts.join('') : `${parts.slice(0, -1).join(', ')} and ${parts.at(-1)}`;
}

function place([, columns], cell) {
  return `row ${Math.floor(cell / columns) + 1}, column ${cell % columns + 1}`;
}

function tokenPlace(picture, token) {
  return `${place(...gridOf(picture, token))}${token < picture.overview ? ' of the overview' : ''}`;
}

function statusOf(answer, picture, selection, ofTokens) {
  const said = [make('b', {}, titleOf(picture, selection)), ` ${detailOf(answer, picture, selection, ofTokens)}`];
  if (state.pinned.kind !== 'all') said.push(make('button', {type: 'button', 'data-focus': 'all', click: () => select(ALL)}, 'Show all tokens'));
  return said;
}

function titleOf(picture, {kind, token, patch, word}) {
  if (kind === 'token') return `Token in ${tokenPlace(picture, token)}`;
  if (kind === 'place') return `Place in ${place(picture.patch_grid, patch)}`;
  return kind === 'word' ? `“${word.text}”` : picture.tokens === 1 ? 'The only visual token' : `All ${picture.tokens} visual tokens`;
}

function detailOf(answer, picture, {kind, token, word}, ofTokens) {
  const readers = () => [...ofTokens.keys()].sort((a, b) => ofTokens[b] - ofTokens[a]).slice(0, 3)
    .map(reader => `${tokenPlace(picture, reader)} (${percent(ofTokens[reader])})`).join('; ');
  const tokens = picture.tokens === 1 ? 'token' : 'tokens';
  if (kind === 'word') return `gave ${percent(sum(word.shares))} of its attention to the picture, the rest to text. Of that, most to the ${tokens} in ${readers()}. ${likelihood(word)}`;
  if (kind === 'place') return `is read most by the ${tokens} in ${readers()}, of all that read it.`;
  const says = kind === 'token' && picture.words[token]?.length
    ? `says ${picture.words[token].map(([said, share]) => `“${said}” ${percent(share)}`).join(', ')}; ` : '';
  if (!picture.scopes) return says;
  if (kind === 'all') return `${picture.tokens === 1 ? 'stands for the whole picture' : 'together'}. Point at a token, or at a place in the picture; click to keep it.`;
  const trusts = answer.scopes.map(({name}, scope) => {
    const trust = trustIn(picture, scope, ofTokens), more = trust - trustIn(picture, scope, ofTokens, picture.usual);
    return `${name} ${percent(trust)}${picture.scopes > 1 ? ` (${signed(more)})` : ''}`;
  });
  return `${says}trusts ${trusts.join(', ')}${picture.scopes > 1 ? '; in brackets, against its mean over the example pictures' : ''}.`;
}

function likelihood({text, probability, likeliest}) {
  const others = likeliest.filter(([token]) => token && !text.startsWith(token)).map(([token, share]) => `“${token}” ${percent(share)}`);
  return `The word was ${percent(probability)} likely${others.length ? `; next came ${others.join(', ')}` : ''}.`;
}

// How far each scope looks, in widths of the picture.
function reachSentence(answer, picture, ofTokens) {
  const parts = answer.scopes.map(({name}, scope) => `${name} ${averageOf(picture.reaches[scope], ofTokens).toFixed(2)}`);
  if (!parts.length) return [];
  parts[0] = parts[0].replace(/ ([\d.]+)$/, ' looks $1 of the picture’s width away');
  return [make('b', {}, 'How far: '), `${listed(parts)}.`];
}

function verdictLine({verdict}) {
  const score = state.known > 1 ? ` ${state.right} of ${state.known} answers are right so far.` : '';
  return make('p', {class: `verdict ${verdict.right ? 'right' : 'wrong'}`},
    make('b', {}, verdict.right ? '✓ The answer is right.' : `✗ The answer is wrong: the truth is “${verdict.truth}”.`), score);
}

function proofLine(answer, proof) {
  const what = proof.scope === null ? `With ${counted(proof.patches.length, 'patch', 'patches')} covered` : `Without ${answer.scopes[proof.scope].name}`;
  return make('li', {}, make('b', {}, what), `: the answer’s probability went from ${chance(proof.before)} to `,
    make('b', {}, chance(proof.after)), proof.answer === proof.said ? '; it is still the answer.' : `; now it says “${proof.answer || '…'}”.`);
}

// How far and how widely a word looked, as numbers; how far from the middle of what it read, as a word has no place.
function wordNumbers({places, size: [width, height]}, {kind, word, shares}) {
  if (kind !== 'word') return ['Point at a word for its numbers.'];
  const read = normalised(shares), mean = [0, 1].map(axis => averageOf(Float32Array.from(places, at => at[axis]), read));
  const away = Float32Array.from(places, ([y, x]) => Math.hypot(x - mean[1], (y - mean[0]) * height / width));
  const bits = -sum(read.map(share => share && share * Math.log2(share)));
  return [`“${word.text}”: ${percent(sum(shares))} of its attention to the picture, entropy ${bits.toFixed(2)} bits of `
    + `${Math.log2(places.length).toFixed(2)}, reach ${averageOf(away, read).toFixed(3)} around the middle of what it read.`];
}

// What is shown in place of the last layer and the mean over heads.
function chosenSentence(answer, {chosen}) {
  const {layer, head} = answer.heard || {}, told = [];
  if (chosen) told.push(`the maps are of the projector’s layer ${chosen.layer + 1}${chosen.head === null ? '' : `, by head ${chosen.head + 1} of ${answer.scopes[chosen.scope].name}`}`);
  if (Number.isInteger(layer) || Number.isInteger(head)) told.push(`the words attend as in ${[['layer', layer], ['head', head]]
    .filter(([, number]) => Number.isInteger(number)).map(([name, number]) => `${name} ${number + 1}`).join(', ')} of the language model`);
  return told.length ? `Chosen under Numbers: ${told.join('; ')}.` : '';
}
