// The scope view. Its value is a message from the page's events: an answer's maps, an answer's words, or null.

const root = element.querySelector('.view'), ALL = {kind: 'all'};
const state = {answers: [], shown: 0, picture: 0, pinned: ALL, pointed: null, mode: 'overlay', opacity: 0.85, timer: null};
const WORD_MILLISECONDS = 700;

// --- What arrives ---------------------------------------------------------------------------------------------

async function receive(message) {
  if (!message) Object.assign(state, {answers: [], shown: 0, picture: 0});
  else if (message.words) return receiveWords(message);
  else {
    state.answers.length = Math.min(state.answers.length, message.number);  // what came later was taken back
    state.answers[message.number] = {...message, pictures: await Promise.all(message.pictures.map(unpackPicture))};
    Object.assign(state, {shown: message.number, picture: 0});
    if (innerWidth <= 700) document.querySelector(props.beside).scrollIntoView();
  }
  stop();
  Object.assign(state, {pinned: ALL, pointed: null});
  build();
}

async function unpackPicture(packed) {
  const image = new Image(), tokens = packed.token_grid[0] * packed.token_grid[1];
  image.src = packed.image;
  const [weights, shares] = await Promise.all([unpack(packed.weights, Float32Array), unpackRows(packed), image.decode()]);
  const width = CANVAS_PIXELS, height = Math.round(width * image.naturalHeight / image.naturalWidth);
  return {
    ...packed, image, weights, shares, tokens, width, height, scopes: weights.length / tokens,
    patches: packed.patch_grid[0] * packed.patch_grid[1], 
    lightGrey: faintGrey(image, width, height, false), darkGrey: faintGrey(image, width, height, true),
  };
}

async function receiveWords(message) {
  const answer = state.answers[message.number];
  if (!answer) return;
  const rows = message.words.length ? await unpackRows(message) : [], width = rows.length / (message.words.length || 1);
  answer.words = message.words.map((text, word) => ({text, shares: rows.slice(word * width, (word + 1) * width)}));
  build();
  if (answer.words.length && state.shown === message.number) play();
}

// --- What is selected: all tokens, a token, a place in the picture, or a word -----------------------------------

function select(selection, pointed = false) {
  stop();
  if (pointed) state.pointed = selection;
  else Object.assign(state, {pinned: selection, pointed: null});
  refresh();
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

function play() {
  const count = state.answers[state.shown].words.length;
  let number = 0;
  select(wordSelection(number));
  state.timer = setInterval(() => {
    if (++number < count) Object.assign(state, {pinned: wordSelection(number)});
    else select(ALL);
    refresh();
  }, WORD_MILLISECONDS);
}

function stop() {
  clearInterval(state.timer);
  state.timer = null;
}

document.addEventListener('keydown', event => {
  if (event.key === 'Escape' && state.pinned.kind !== 'all') select(ALL);
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
  const focused = document.activeElement?.dataset.focus, answer = state.answers[state.shown];
  root.replaceChildren(...(answer ? answerView(answer) : blankView()));
  if (focused) root.querySelector(`[data-focus="${focused}"]`)?.focus({preventScroll: true});
  refresh();
}

function refresh() {
  const answer = state.answers[state.shown], picture = answer?.pictures[state.picture];
  if (!picture || !root.querySelector('.status')) return;
  const selection = selected(), ofTokens = tokenShares(picture, selection), style = getComputedStyle(root);
  const look = {
    mode: state.mode, opacity: state.opacity, dark: document.body.classList.contains('dark'),
    paper: style.getPropertyValue('--paper').trim(), ink: style.getPropertyValue('--ink').trim(),
  };
  root.querySelectorAll('[data-figure]').forEach(figure => paintFigure(figure, answer, picture, selection, ofTokens, look));
  root.querySelector('.status').replaceChildren(...statusOf(answer, picture, selection, ofTokens));
  root.querySelectorAll('[data-token]').forEach((button, token) => {
    button.setAttribute('aria-pressed', token === state.pinned.token);
    button.tabIndex = token === (state.pinned.token || 0) ? 0 : -1;  // one tab stop; arrow keys lead to the others
  });
  root.querySelectorAll('[data-word]').forEach(button => button.setAttribute('aria-pressed', button.dataset.word === String(selection.number)));
}

function paintFigure(figure, answer, picture, selection, ofTokens, look) {
  const canvas = figure.querySelector('canvas'), kind = figure.dataset.figure;
  if (kind === 'picture') canvas.getContext('2d').drawImage(picture.image, 0, 0, picture.width, picture.height);
  else if (kind === 'tokens') {
    const faded = ['place', 'word'].includes(selection.kind) ? ofTokens : tokenShares(picture, ALL);
    paintTokens(canvas, picture, faded, answer.scopes.map(scope => scope.colour), look);
    if (picture.words.length) paintTokenWords(canvas, picture, look);
  } else {
    const scope = answer.scopes[kind], map = scope ? scopeMap(picture, Number(kind), ofTokens) : fusedMap(picture, ofTokens);
    paintMap(canvas, picture, map, scope ? scope.colour : props.fused_colour, look);
    figure.querySelector('.peak').textContent = percent(largest(map));
    figure.querySelector('.legend').style.visibility = state.mode === 'picture' ? 'hidden' : '';
    if (scope) figure.querySelector('.number').textContent = `trust ${percent(trustIn(picture, Number(kind), ofTokens))}`;
  }
  if (selection.kind === 'token') paintFrame(canvas, picture.token_grid, selection.token);
  if (selection.kind === 'place' && kind !== 'tokens') paintFrame(canvas, picture.patch_grid, selection.patch);
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
  if (kind === 'word') return `gave ${percent(sum(word.shares))} of its attention to the picture, the rest to text. Of that, most to the ${tokens} in ${readers()}.`;
  if (kind === 'place') return `is read most by the ${tokens} in ${readers()}, of all that read it.`;
  const says = kind === 'token' && picture.words.length
    ? `says ${picture.words[token].map(([said, share]) => `“${said}” ${percent(share)}`).join(', ')}; ` : '';
  if (!picture.scopes) return says;
  if (kind === 'all') return `${picture.tokens === 1 ? 'stands for the whole picture' : 'together'}. Point at a token, or at a place in the picture; click to keep it.`;
  return `${says}trusts ${answer.scopes.map(({name}, scope) => `${name} ${percent(trustIn(picture, scope, ofTokens))}`).join(', ')}.`;
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
  sheet.toBlob(file => {
    const address = URL.createObjectURL(file);
    make('a', {href: address, download: 'scopes.png'}).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
}

new MutationObserver(refresh).observe(document.body, {attributes: true, attributeFilter: ['class']});  // dark or light
let received = Promise.resolve();  // messages are unpacked one after the other
watch(Object.keys(props), () => {  // scopes, too, which come with another model: in quotes, Gradio takes them for an event
  const message = props.value;
  received = received.then(() => receive(message)).catch(console.error);  // a broken one does not stop those after it
});
build();
