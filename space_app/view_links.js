// What the scope view shows first, and links that bring a view back.

const link = new URLSearchParams(location.search);

// The words of the first answer play by themselves; then, of the tokens that they attended to most, one is kept.
function open() {
  const answer = state.answers[0], picture = answer.pictures[0], still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  const most = (answer.words || []).map((_, number) => wordSelection(number).shares).map(shares => shares.indexOf(largest(shares)));
  const away = token => Math.hypot(...picture.places[token].map(at => at - 0.5));  // its rings fit in the middle
  const [token] = [...most, picture.tokens - 1].sort((a, b) => away(a) - away(b));
  if (answer.words && !still) play({kind: 'token', token});
  else select({kind: 'token', token});
}

// What a link names is kept in view once its example is answered.
function restore(message) {
  const {tokens, patches} = state.answers[message.number].pictures[0];
  if (!link.has('example') || message.example !== Number(link.get('example'))) return;
  link.delete('example');
  state.mode = ['picture', 'overlay', 'heat', 'difference'].find(mode => mode === link.get('show')) || state.mode;
  const [token, patch] = ['token', 'place'].map(kind => link.has(kind) ? Math.trunc(link.get(kind)) : -1);
  if (token >= 0 && token < tokens) state.pinned = {kind: 'token', token};
  if (patch >= 0 && patch < patches) state.pinned = {kind: 'place', patch};
  const [layer, scope, head, words_layer, words_head] = ['layer', 'scope', 'head', 'words_layer', 'words_head'].map(
    name => link.has(name) ? Number(link.get(name)) : null);
  if (layer !== null) state.linked.push(['layer', {picture: 0, layer, scope, head}]);
  if (words_layer !== null || words_head !== null) state.linked.push(['words', {layer: words_layer, head: words_head}]);
  if (state.linked.length) state.numbers = true;
  build();
  requestLinked();
}

// Layers and heads that a link names are asked for one after the other, once the answer is whole.
function requestLinked() {
  if (!state.linked.length) return;
  if (element.closest('.page').querySelector('.ask .stop-button')) setTimeout(requestLinked, 100);
  else request(...state.linked[0]);
}

function linkTo(answer) {
  const address = new URL(location.href), {token, patch} = state.pinned;
  const {layer, scope, head} = answer.pictures[0].chosen || {}, {layer: words_layer, head: words_head} = answer.heard || {};
  const chosen = {layer, scope, head, words_layer, words_head}, {tiles} = answer.asked;
  const wanted = {example: answer.example, tokens: sum(answer.pictures.map(picture => picture.tokens)), tiles, show: state.mode, token, place: patch, ...chosen};
  Object.entries(wanted).forEach(([name, value]) => (value ?? null) === null ? address.searchParams.delete(name) : address.searchParams.set(name, value));
  return address.href;
}
