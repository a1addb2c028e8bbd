// The scope view. Its value is a message from the page's events: an answer's maps, the reply to a request, or null.

const root = element.querySelector('.view'), own = element.closest('.block').id, ALL = {kind: 'all'};
const state = {
  answers: [], shown: 0, picture: 0, pinned: ALL, pointed: null, mode: 'overlay', opacity: 0.85, timer: null,
  proof: null, numbers: false, requests: 0, linked: [], other: null, known: 0, right: 0,
};
const WORD_MILLISECONDS = 450;

// --- What arrives ---------------------------------------------------------------------------------------------

async function receive(message) {
  if (!message) Object.assign(state, {answers: [], shown: 0, picture: 0, known: 0, right: 0});
  else if (!message.pictures) return receiveReply(message);
  else if (state.answers[message.number]?.milliseconds === message.milliseconds) return complete(message);
  else {
    state.answers.length = Math.min(state.answers.length, message.number);  // what came later was taken back
    const pictures = await Promise.all(message.pictures.map(unpackPicture)), words = await unpackWords(message.words);
    state.answers[message.number] = {...message, pictures, words, proofs: []};
    count(message.verdict);
    Object.assign(state, {shown: message.number, picture: 0});
    if (innerWidth <= 700 && !message.opening) document.querySelector(props.beside).scrollIntoView();
  }
  stop();
  Object.assign(state, {pinned: ALL, pointed: null, proof: null});
  build();
  if (message?.opening) open();
  if (message && props.asks) restore(message);
}

// An answer that is there has ended.
async function complete(message) {
  const answer = state.answers[message.number];
  if (!answer.verdict) count(message.verdict);
  answer.verdict = message.verdict;
  answer.words ||= await unpackWords(message.words);
  build();
}

function count(verdict) {
  if (!verdict) return;
  state.known++;
  state.right += verdict.right;
}

async function receiveReply(message) {
  const answer = state.answers[message.number];
  if (!answer) return;
  if (message.file) download(message.file.name, `data:application/octet-stream;base64,${message.file.content}`);
  if (message.proof) {
    answer.proofs.push(message.proof);
    state.proof = message.proof;
  }
  if (message.layer) await showLayer(answer, message.layer);
  const isNew = !answer.words && !state.linked.length;
  answer.words = await unpackWords(message.words) || answer.words;
  if (message.words) answer.heard = {layer: message.words.layer, head: message.words.head};
  if (state.pinned.kind === 'word') state.pinned = wordSelection(state.pinned.number);
  build();
  if (message.words && isNew && state.shown === message.number) play();
  if (state.linked.shift()) requestLinked();
}

async function unpackPicture(packed) {
  const image = new Image(), count = ([rows, columns]) => rows * columns;
  const overview = count(packed.overview_grid), tokens = overview + count(packed.token_grid);
  image.src = packed.image;
  const [layer] = await Promise.all([unpackLayer(packed), image.decode()]);
  const width = CANVAS_PIXELS, height = Math.round(width * image.naturalHeight / image.naturalWidth);
  const picture = {
    ...packed, ...layer, image, tokens, overview, width, height, scopes: layer.weights.length / tokens,
    patches: count(packed.patch_grid),
    lightGrey: faintGrey(image, width, height, false), darkGrey: faintGrey(image, width, height, true),
  };
  return {...picture, reaches: reaches(picture)};
}

// The trust in scopes, what is usual for it, and where tokens looked.
async function unpackLayer(packed) {
  const trusts = [packed.weights, packed.usual].map(numbers => unpack(numbers, Float32Array));
  const [weights, usual, shares] = await Promise.all([...trusts, unpackRows(packed)]);
  return {weights, usual, shares};
}

// A layer of the projector that was asked for takes the place of what the answer came with, which is kept.
async function showLayer(answer, chosen) {
  const {first, ...before} = answer.pictures[chosen.picture], {layer, scope, head} = chosen;
  const picture = {...before, ...await unpackLayer(chosen), first: first || before, chosen: {layer, scope, head}};
  answer.pictures[chosen.picture] = {...picture, reaches: reaches(picture)};
}

async function unpackWords(packed) {
  if (!packed) return null;
  const rows = await unpackRows(packed), width = rows.length / packed.texts.length;
  return packed.texts.map((text, word) => ({
    text, shares: rows.slice(word * width, (word + 1) * width), probability: packed.probabilities[word], likeliest: packed.likeliest[word],
  }));
}

// Asks the server about the shown answer.
function request(kind, wanted = {}) {
  root.querySelectorAll('[data-request]').forEach(button => button.setAttribute('aria-busy', 'true'));
  trigger(kind, {number: state.shown, request: ++state.requests, ...state.answers[state.shown].asked, ...wanted});
}

// --- What is selected: all tokens, a token, a place in the picture, or a word -----------------------------------

function select(selection, pointed = false) {
  stop();
  if (pointed) state.pointed = selection;
  else Object.assign(state, {pinned: selection, pointed: null, proof: null});
  refresh();
  tellOther({selection, pointed});
}

function selected() {
  return state.pointed || state.pinned;
}

function wordSelection(number) {
  const answer = state.answers[state.shown], earlier = answer.pictures.slice(0, state.picture);
  const begin = sum(earlier.map(picture => picture.tokens)), word = answer.words[number];
  const shares = word.shares.slice(begin, begin + answer.pictures[state.picture].tokens);
  return {kind: 'word', number, word, shares};
}

// Shows one word after the other, and then what is given.
function play(last = ALL) {
  const count = state.answers[state.shown].words.length;
  let number = 0;
  select(wordSelection(number));
  state.timer = setInterval(() => {
    if (++number < count) Object.assign(state, {pinned: wordSelection(number)});
    else select(last);
    refresh();
  }, WORD_MILLISECONDS);
  refresh();
}

function stop() {
  clearInterval(state.timer);
  state.timer = null;
}

document.addEventListener('keydown', event => {
  if (event.key === 'Escape' && (state.pinned.kind !== 'all' || state.timer)) select(ALL);
});

// A click on an answer in the chat shows its maps, unless it marks text.
element.closest('.page').addEventListener('click', event => {
  const turn = event.target.closest('#chat .bot-row');
  if (!turn || event.target.closest('button') || !getSelection().isCollapsed) return;
  const number = [...document.querySelectorAll('#chat .bot-row')].indexOf(turn);
  if (state.answers[number]) show({shown: number, picture: 0});
});

// --- What is shown ----------------------------------------------------------------------------------------------

function show(choice) {
  select(ALL);
  Object.assign(state, choice);
  build();
}

function build() {
  const answer = state.answers[state.shown];
  keepingFocus(() => {
    root.replaceChildren(...(answer ? answerView(answer) : blankView()));
    refresh();
  });
}

function keepingFocus(change) {
  const focused = root.contains(document.activeElement) && document.activeElement.dataset.focus;
  change();
  if (focused) root.querySelector(`[data-focus="${focused}"]`)?.focus({preventScroll: true});
}

function fill(place, parts) {
  keepingFocus(() => root.querySelector(place).replaceChildren(...parts));
}

function refresh(tells = true) {
  const answer = state.answers[state.shown], picture = answer?.pictures[state.picture];
  if (!picture || !root.querySelector('.status')) return;
  const selection = selected(), ofTokens = tokenShares(picture, selection), style = getComputedStyle(root);
  const look = {
    mode: state.mode, opacity: state.opacity, dark: document.body.classList.contains('dark'),
    paper: style.getPropertyValue('--paper').trim(), ink: style.getPropertyValue('--ink').trim(),
  };
  const maps = mapsOf(picture, ofTokens);
  root.querySelectorAll('[data-figure]').forEach(figure => paintFigure(figure, answer, picture, selection, ofTokens, maps, look));
  fill('.status', statusOf(answer, picture, selection, ofTokens));
  root.querySelector('.status').ariaLive = state.timer ? 'off' : 'polite';  // or a reader would speak every word
  fill('.reach', reachSentence(answer, picture, ofTokens));
  if (props.asks) fill('.asking', questionsAgain(answer, picture));
  if (picture.scopes && state.numbers) fill('.numbers tbody', numberRows(answer, picture, ofTokens));
  if (props.asks && state.numbers) fill('.numbers .spoken', wordNumbers(picture, selection));
  root.querySelectorAll('.tokens').forEach(grid => {
    const cells = [...grid.children], kept = cells.find(cell => Number(cell.dataset.token) === state.pinned.token);
    cells.forEach(cell => {
      cell.setAttribute('aria-pressed', cell === kept);
      cell.tabIndex = cell === (kept || cells[0]) ? 0 : -1;  // one tab stop; arrow keys lead to the others
    });
  });
  root.querySelectorAll('[data-word]').forEach(button => button.setAttribute('aria-pressed', button.dataset.word === String(selection.number)));
  root.querySelectorAll('.play').forEach(button => { button.textContent = state.timer ? '■ Stop' : '▶ Play the words'; });
  if (tells && picture.scopes) tellOther({map: fusedMap(picture, ofTokens)});
}

// Of all figures: where tokens looked in each scope, and in all; as far as that differs from their mean, if that is shown.
function mapsOf(picture, ofTokens) {
  const maps = Array.from({length: picture.scopes}, (_, scope) => scopeMap(picture, scope, ofTokens)), fused = fusedMap(picture, ofTokens);
  if (state.mode !== 'difference' || picture.scopes < 2) return {scopes: maps, fused};
  return {scopes: maps.map(map => difference(map, maps)), fused: difference(fused, maps)};
}

function paintFigure(figure, answer, picture, selection, ofTokens, maps, look) {
  const canvas = figure.querySelector('canvas'), kind = figure.dataset.figure, scope = answer.scopes[kind], {paper, ink} = look;
  const isOfTokens = ['tokens', 'overview'].includes(kind);
  if (kind === 'picture') {
    canvas.getContext('2d').drawImage(picture.image, 0, 0, picture.width, picture.height);
    if (state.proof?.picture === state.picture) {
      paintCover(canvas, picture.patch_grid, state.proof.patches);
      paintLabel(canvas, `${chance(state.proof.before)} → ${chance(state.proof.after)}`, [0, 22], ink, look);
    }
  } else if (isOfTokens) {
    const byShare = ['place', 'word'].includes(selection.kind), part = kind === 'tokens' ? [picture.token_grid, picture.overview] : [picture.overview_grid, 0];
    paintTokens(canvas, picture, part, ofTokens, byShare, answer.scopes.map(one => one.colour), props.fused_colour, look);
    if (picture.words.length) paintTokenWords(canvas, picture, part, look);
    if (kind === 'tokens' && picture.scopes > 1) figure.querySelector('.legend').style.visibility = byShare ? 'hidden' : '';
    figure.querySelector('.number').textContent = byShare ? 'by attention' : picture.scopes > 1 ? 'by trust' : part[0].join(' × ');
  } else if (kind === 'versus') {
    const map = difference(fusedMap(picture, ofTokens), [state.other.map]), peak = largest(map);
    paintMap(canvas, picture, map, props.fused_colour, peak, {...look, mode: 'difference'});
    figure.querySelector('.peak').textContent = `${percent(peak)} more in B`;
    figure.querySelector('.number').textContent = 'grey: more in A';
  } else {
    const peak = largest(maps.scopes.map(largest));  // one scale for all
    paintMap(canvas, picture, scope ? maps.scopes[kind] : maps.fused, scope ? scope.colour : props.fused_colour, peak, look);
    figure.querySelector('.peak').textContent = percent(peak);
    figure.querySelector('.legend').style.visibility = state.mode === 'picture' ? 'hidden' : '';
    if (scope) figure.querySelector('.number').textContent = `trust ${percent(trustIn(picture, Number(kind), ofTokens))}`;
  }
  const isElsewhere = isOfTokens && (selection.token < picture.overview) !== (kind === 'overview');
  if (selection.kind === 'token' && !isElsewhere) {
    paintFrame(canvas, ...gridOf(picture, selection.token));
    const at = picture.places[selection.token], around = kind === 'picture' ? answer.scopes : scope ? [scope] : [];
    const ring = one => picture.reaches[answer.scopes.indexOf(one)][selection.token];
    around.forEach(one => paintRing(canvas, at, ring(one), one.colour, paper));
    around.forEach((one, turn) => paintReach(canvas, at, ring(one), one.colour, look, (turn + 1) / 6));
  }
  if (selection.kind === 'place' && !isOfTokens) paintFrame(canvas, picture.patch_grid, selection.patch);
}

function download(name, address) {
  make('a', {href: address, download: name}).click();
}

// All figures on one sheet, as they are now.
function save() {
  const all = [...root.querySelectorAll('[data-figure]')], columns = Math.min(3, all.length), style = getComputedStyle(root);
  const {width, height} = all[0].querySelector('canvas'), margin = 24, title = 34;
  const sheet = newCanvas(margin + columns * (width + margin), margin + Math.ceil(all.length / columns) * (height + title + margin) + title);
  const context = sheet.getContext('2d');
  context.fillStyle = style.getPropertyValue('--paper').trim();
  context.fillRect(0, 0, sheet.width, sheet.height);
  Object.assign(context, {fillStyle: style.color, font: `17px ${style.fontFamily}`});
  all.forEach((figure, number) => {
    const left = margin + number % columns * (width + margin), top = margin + Math.floor(number / columns) * (height + title + margin);
    const [name, note, peak] = ['b', '.number', '.peak'].map(part => figure.querySelector(part)?.textContent);
    context.fillText([name, note, peak && `peak ${peak}`].filter(Boolean).join(' · '), left, top + 20, width);
    context.drawImage(figure.querySelector('canvas'), left, top + title);
  });
  context.fillText(root.querySelector('.status b').textContent, margin, sheet.height - margin / 2 - 6);
  download('scopes.png', sheet.toDataURL());
}

new MutationObserver(() => refresh()).observe(document.body, {attributes: true, attributeFilter: ['class']});  // dark or light
let received = Promise.resolve();  // messages are unpacked one after the other
watch(Object.keys(props), () => {  // scopes, too, which come with another model: in quotes, Gradio takes them for an event
  const message = props.value;
  received = received.then(() => receive(message)).catch(console.error);  // a broken one does not stop those after it
});
build();
