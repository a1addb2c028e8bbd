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

function statusOf(answer, picture, selection, ofTokens) {
  const said = [make('b', {}, titleOf(picture, selection)), ` ${detailOf(answer, picture, selection, ofTokens)}`];
  if (state.pinned.kind !== 'all') said.push(make('button', {type: 'button', 'data-focus': 'all', click: () => select(ALL)}, 'Show all tokens'));
  return said;
}

function titleOf(picture, {kind, token, patch, word}) {
  if (kind === 'token') return `Token in ${place(picture.token_grid, token)}`;
  if (kind === 'place') return `Place in ${place(picture.patch_grid, patch)}`;
  return kind === 'word' ? `“${word.text}”` : picture.tokens === 1 ? 'The only visual token' : `All ${picture.tokens} visual tokens`;
}

function detailOf(answer, picture, {kind, token, word}, ofTokens) {
  const readers = () => [...ofTokens.keys()].sort((a, b) => ofTokens[b] - ofTokens[a]).slice(0, 3)
    .map(reader => `${place(picture.token_grid, reader)} (${percent(ofTokens[reader])})`).join('; ');
  const tokens = picture.tokens === 1 ? 'token' : 'tokens';
  if (kind === 'word') return `gave ${percent(sum(word.shares))} of its attention to the picture, the rest to text. Of that, most to the ${tokens} in ${readers()}. ${likelihood(word)}`;
  if (kind === 'place') return `is read most by the ${tokens} in ${readers()}, of all that read it.`;
  const says = kind === 'token' && picture.words[token]?.length
    ? `says ${picture.words[token].map(([said, share]) => `“${said}” ${percent(share)}`).join(', ')}; ` : '';
  if (!picture.scopes) return says;
  if (kind === 'all') return `${picture.tokens === 1 ? 'stands for the whole picture' : 'together'}. Point at a token, or at a place in the picture; click to keep it.`;
  const everywhere = tokenShares(picture, ALL);
  const trusts = answer.scopes.map(({name}, scope) => {
    const trust = trustIn(picture, scope, ofTokens), more = picture.tokens > 1 ? ` (${signed(trust - trustIn(picture, scope, everywhere))})` : '';
    return `${name} ${percent(trust)}${picture.scopes > 1 ? more : ''}`;
  });
  return `${says}trusts ${trusts.join(', ')}${picture.scopes > 1 && picture.tokens > 1 ? '; in brackets, against the mean of all tokens' : ''}.`;
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
