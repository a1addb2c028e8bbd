// The elements of the scope view, built anew for every answer and picture; view.js fills and moves them.

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function blankView() {
  const maps = props.scopes.map(({name, colour}) => caption(name, colour));
  if (maps.length > 1) maps.unshift(caption('all scopes, fused', props.fused_colour));
  const figures = [caption('The picture'), caption('Its visual tokens'), ...maps].map(
    title => make('figure', {}, title, make('div', {class: 'blank'})));
  const how = 'Ask about a picture, and this shows where each scope looked in it, how far each visual token trusted it, '
    + 'and what each word of the answer attended to.';
  return [make('h2', {}, 'What each scope looked at'), make('p', {class: 'quiet'}, how), make('div', {class: 'figures'}, ...figures)];
}

function answerView(answer) {
  const picture = answer.pictures[state.picture];
  const parts = [make('div', {class: 'title'}, make('h2', {}, 'What each scope looked at'), costLine(answer))];
  if (answer.note) parts.push(noteLine(answer));
  if (answer.verdict) parts.push(verdictLine(answer));
  parts.push(selectors(answer));
  if (!picture.scopes) parts.push(make('p', {class: 'note'}, props.without_scopes));
  else if (dominant(answer, picture)) parts.push(make('p', {class: 'note'}, dominant(answer, picture)));
  if (answer.without_words) parts.push(make('p', {class: 'note'}, answer.without_words));
  if (chosenSentence(answer, picture)) parts.push(make('p', {class: 'note'}, chosenSentence(answer, picture)));
  const about = [make('p', {class: 'status', 'aria-live': 'polite'}), make('p', {class: 'reach'})];
  if (props.asks || answer.words) about.unshift(wordStrip(answer));
  // Of two views side by side, the figures are at the same height.
  parts.push(...(props.asks ? [...about, figures(answer, picture)] : [figures(answer, picture), ...about]));
  if (picture.scopes) parts.push(toolbar(answer));
  parts.push(make('div', {class: 'asking', role: 'group', 'aria-label': 'Ask again'}));
  if (answer.proofs.length) parts.push(make('ul', {class: 'proofs', 'aria-live': 'polite'}, ...answer.proofs.map(proof => proofLine(answer, proof))));
  if (picture.scopes || props.asks) parts.push(numbers(answer, picture));
  return parts;
}

function costLine(answer) {
  const tokens = sum(answer.pictures.map(({read}) => read)), patches = sum(answer.pictures.map(picture => picture.patches));
  const saved = tokens < patches ? `, ${percent(1 - tokens / patches)} saved` : '';
  const read = answer.reading ? `read in ${Math.round(answer.reading)} ms` : 'read before, and reused';
  return make('p', {class: 'cost'},
    make('b', {}, counted(tokens, 'visual token')), ` from ${counted(patches, 'patch', 'patches')}${saved} · ${read} · first token after `,
    make('b', {}, `${Math.round(answer.milliseconds)} ms`));
}

// What is foreign to the model, with buttons that ask something else; while an answer is written, they ask nothing.
function noteLine({note: {text, buttons, about}}) {
  const isWritten = () => [...document.querySelectorAll('.ask .stop-button')].some(button => button.checkVisibility());
  const ask = value => () => isWritten() || trigger('suggested', {value, about});
  const asked = buttons.map(({value, label}) => make('button', {type: 'button', click: ask(value)}, label));
  return make('div', {class: 'note', role: 'group', 'aria-label': 'Note on the answer'}, make('p', {}, text), ...asked);
}

function selectors(answer) {
  const row = make('div', {class: 'selectors'});
  const choice = (kind, numbers, current, choose) => numbers.length > 1 && row.append(make('div', {role: 'group', 'aria-label': kind},
    ...numbers.map(number => make('button', {
      type: 'button', 'aria-pressed': String(number === current), 'data-focus': `${kind}${number}`,
      click: () => show(choose(number)),
    }, `${kind} ${number + 1}`))));
  choice('Answer', Object.keys(state.answers).map(Number), state.shown, number => ({shown: number, picture: 0}));
  choice('Picture', [...answer.pictures.keys()], state.picture, number => ({picture: number}));
  return row;
}

function dominant(answer, picture) {
  const everywhere = tokenShares(picture, ALL);
  const first = answer.scopes.findIndex((_, scope) => trustIn(picture, scope, everywhere) > 0.95);
  return picture.scopes > 1 && first >= 0 && `Here the ${answer.scopes[first].name} scope took nearly all the trust: the other `
    + 'maps show where those scopes looked, not what reached the answer.';
}

function toolbar(answer) {
  const shown = [['picture', 'Original'], ['overlay', 'Overlay'], ['heat', 'Heat map'], ['difference', 'Difference']];
  const modes = shown.slice(0, answer.scopes.length > 1 ? 4 : 3).map(([mode, label]) => make('label', {},
    make('input', {type: 'radio', name: `mode-${own}`, value: mode, 'data-focus': mode, ...(mode === state.mode ? {checked: ''} : {}),
      change: () => { state.mode = mode; refresh(); }}), label));
  const opacity = make('input', {type: 'range', min: 10, max: 100, value: 100 * state.opacity,
    input: event => { state.opacity = event.target.value / 100; refresh(); }});
  const button = (text, click, attributes = {}) => make('button', {type: 'button', click, ...attributes}, text);
  const file = kind => button(kind, () => request('download', {kind}), {'data-request': '', 'aria-label': `Save as ${kind}`});
  const saves = [button('PNG', save, {'aria-label': 'Save as PNG'}), ...(props.asks ? [file('npz'), file('json')] : [])];
  const copy = event => navigator.clipboard.writeText(linkTo(answer)).then(() => { event.target.textContent = 'Copied'; });
  return make('div', {class: 'toolbar'},
    make('fieldset', {}, make('legend', {}, 'Show'), ...modes), make('label', {class: 'opacity'}, 'Opacity', opacity),
    make('div', {role: 'group', 'aria-label': 'Save'}, 'Save ', ...saves),
    ...(props.asks && answer.example !== null ? [button('Copy a link to this view', copy)] : []));
}

// Buttons that ask the question again: with what is kept in view covered, or without a scope.
function questionsAgain(answer, picture) {
  const {kind, patch, word} = state.pinned, readers = tokenShares(picture, state.pinned);
  const covered = () => kind === 'place' ? around(picture.patch_grid, patch) : mostRead(picture.scopes ? fusedMap(picture, readers) : cellMap(picture, readers));
  const button = (text, change, focus) => make('button', {type: 'button', 'data-request': '', 'data-focus': focus,
    click: () => request('proof', {picture: state.picture, patches: [], scope: null, ...change()})}, text);
  const scopes = answer.scopes.length > 1 ? answer.scopes.map(({name}, scope) => button(`without ${name}`, () => ({scope}), `without${scope}`)) : [];
  const what = {place: 'this place', token: 'what this token read most', word: `what “${word?.text}” read most`}[kind];
  const buttons = what ? [button(`cover ${what}`, () => ({patches: covered()}), 'cover'), ...scopes] : scopes;
  return buttons.length ? [make('b', {}, 'Ask again: '), ...buttons] : [];
}

// A patch and its neighbours.
function around([rows, columns], patch) {
  const near = (one, other) => Math.abs(one - other) < 2;
  return [...Array(rows * columns).keys()].filter(other =>
    near(Math.floor(other / columns), Math.floor(patch / columns)) && near(other % columns, patch % columns));
}

function numbers(answer, picture) {
  const heads = ['scope', 'trust', 'against usual', 'reach', 'entropy', 'peak'].map(name => make('th', {scope: 'col'}, name));
  const toggle = event => {
    state.numbers = event.currentTarget.open;
    refresh();
  };
  const parts = [make('summary', {'data-focus': 'numbers'}, 'Numbers')];
  if (props.asks && props.layers.length) parts.push(mapChoice(answer, picture));
  if (picture.scopes) parts.push(make('table', {}, make('thead', {}, make('tr', {}, ...heads)), make('tbody')));
  if (props.asks) parts.push(wordChoice(answer), make('p', {class: 'spoken'}));
  return make('details', {class: 'numbers', toggle, ...(state.numbers ? {open: ''} : {})}, ...parts);
}

function chooser(label, options, chosen, choose) {
  const made = options.map(([value, name]) => make('option', {value, selected: value === chosen && ''}, name));
  return make('label', {}, label, make('select', {'aria-label': label, 'data-focus': label, 'data-request': '', change: event => choose(event.target.value)}, ...made));
}

function numbered(name, count) {
  return [...Array(count).keys()].map(number => [String(number), `${name} ${number + 1}`]);
}

// Of the maps: a layer of the projector, and a head of one scope; at first the last layer and the mean over heads.
function mapChoice(answer, picture) {
  const last = props.layers.length - 1, {layer, scope, head} = picture.chosen || {layer: last, scope: null, head: null};
  const choose = (layer, scope, head) => {
    if (layer < last || head !== null) return request('layer', {picture: state.picture, layer, scope, head});
    answer.pictures[state.picture] = picture.first;
    build();
  };
  const heads = props.layers[layer].flatMap((count, scope) => numbered(answer.scopes[scope].name, count).map(([value, name]) => [`${scope},${value}`, name]));
  const ofHead = value => value ? value.split(',').map(Number) : [null, null];
  return make('div', {class: 'choice'},
    ...(last ? [chooser('Layer of the maps', numbered('layer', last + 1), String(layer), value => choose(Number(value), scope, head))] : []),
    chooser('Head of the maps', [['', 'mean over heads'], ...heads], head === null ? '' : `${scope},${head}`, value => choose(layer, ...ofHead(value))));
}

// Of the words: a layer and a head of the language model, or the mean over all.
function wordChoice(answer) {
  const {layer, head} = answer.heard || {}, [layers, heads] = props.language_heads;
  const choose = (layer, head) => request('words', {layer: layer ?? null, head: head ?? null});
  const value = number => String(number ?? ''), number = value => value === '' ? null : Number(value);
  return make('div', {class: 'choice'},
    chooser('Layer of the words', [['', 'mean over layers'], ...numbered('layer', layers)], value(layer), chosen => choose(number(chosen), head)),
    chooser('Head of the words', [['', 'mean over heads'], ...numbered('head', heads)], value(head), chosen => choose(layer, number(chosen))));
}

function numberRows(answer, picture, ofTokens) {
  return answer.scopes.map(({name}, scope) => {
    const trust = trustIn(picture, scope, ofTokens), peak = largest(scopeMap(picture, scope, ofTokens));
    const reach = averageOf(picture.reaches[scope], ofTokens).toFixed(3), bits = `${entropyOf(picture, scope, ofTokens).toFixed(2)} bits`;
    const cells = [percent(trust), `${signed(trust - trustIn(picture, scope, ofTokens, picture.usual))} points`, reach, bits, percent(peak)];
    return make('tr', {}, make('th', {scope: 'row'}, name), ...cells.map(cell => make('td', {}, cell)));
  });
}

function caption(title, colour = null, note = '') {
  const name = make('b', {}, ...(colour ? [make('i', {class: 'swatch', style: `background:${colour}`})] : []), title);
  return make('figcaption', {}, name, make('span', {class: 'number'}, note));
}

function figures(answer, picture) {
  const maps = answer.scopes.map(({name, colour}, scope) => mapFigure(picture, name, colour, scope));
  if (picture.scopes > 1) maps.unshift(mapFigure(picture, 'all scopes, fused', props.fused_colour, 'fused'));
  const versus = state.other && picture.scopes && String(state.other.patch_grid) === String(picture.patch_grid);
  if (versus) maps.push(mapFigure(picture, 'B minus A', null, 'versus'));
  const tokens = [tokenFigure(answer, picture)];
  if (picture.overview) tokens.push(overviewFigure(answer, picture));
  return make('div', {class: 'figures'}, pictureFigure(picture), ...tokens, ...maps);
}

function canvasOf(picture, label) {
  return make('canvas', {width: picture.width, height: picture.height, role: 'img', 'aria-label': label});
}

function pictureFigure(picture) {
  const canvas = canvasOf(picture, 'The picture as the model saw it'), [width, height] = picture.size;
  let cursor = Math.floor(picture.patches / 2);
  const go = event => {
    const [rows, columns] = picture.patch_grid, row = Math.floor(cursor / columns), column = cursor % columns;
    const moved = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!moved) return;
    event.preventDefault();
    cursor = Math.min(rows - 1, Math.max(0, row + moved[0])) * columns + Math.min(columns - 1, Math.max(0, column + moved[1]));
    select({kind: 'place', patch: cursor});
  };
  const name = 'Places in the picture. Arrow keys move over its patches and show which tokens read them';
  const reading = {role: 'application', tabindex: 0, 'data-focus': 'picture', 'aria-label': name, keydown: go};
  const [rows, columns] = picture.tiles, cut = rows * columns > 1 ? `in ${rows} × ${columns} tiles` : 'as seen';
  return make('figure', {'data-figure': 'picture'}, caption('The picture', null, `${cut}, ${width} × ${height}`),
    make('div', {...framed(picture), ...(picture.scopes ? reading : {}), ...placing(picture, true)}, canvas));
}

// Listeners that turn a point of a canvas into a place in the picture.
function placing(picture, pointing) {
  if (!picture.scopes) return {};
  const at = event => {
    const box = event.currentTarget.getBoundingClientRect(), [rows, columns] = picture.patch_grid;
    const cell = (offset, length, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / length * count)));
    const row = cell(event.clientY - box.top, box.height, rows), column = cell(event.clientX - box.left, box.width, columns);
    return {kind: 'place', patch: row * columns + column};
  };
  const click = {click: event => select(at(event))};
  if (!pointing) return click;
  return {...click, pointermove: event => event.pointerType === 'mouse' && select(at(event), true), pointerleave: unpoint};
}

function unpoint() {
  if (state.pointed) select(null, true);
}

// A frame around a canvas; a tall picture leaves the page some room.
function framed({width, height}) {
  return {class: 'frame', style: height > 1.5 * width && `max-width:${36 * width / height}rem`};
}

function tokenFigure(answer, picture) {
  const about = 'The grid of visual tokens, each in the colour of the scope that it trusts most above usual';
  return make('figure', {'data-figure': 'tokens'}, caption('Its visual tokens', null, picture.token_grid.join(' × ')),
    make('div', framed(picture), canvasOf(picture, about), tokenGrid(answer, picture, picture.token_grid, picture.overview, 'Visual tokens')),
    ...(picture.scopes > 1 ? [make('div', {class: 'legend'}, 'Colour: the scope that a token trusts most above its mean over the example pictures.')] : []));
}

// Of a picture in tiles: the tokens of the view in which the tower sees all of it at once.
function overviewFigure(answer, picture) {
  return make('figure', {'data-figure': 'overview'}, caption('Tokens of its overview', null, picture.overview_grid.join(' × ')),
    make('div', framed(picture), canvasOf(picture, 'The grid of the overview’s visual tokens'), tokenGrid(answer, picture, picture.overview_grid, 0, 'Visual tokens of the overview')));
}

// Buttons over a grid of tokens, which begins at one.
function tokenGrid(answer, picture, [rows, columns], first, name) {
  const grid = make('div', {class: 'tokens', role: 'group', 'aria-label': name, style: `--columns:${columns}`, keydown: walk, pointerleave: unpoint});
  for (let token = first; token < first + rows * columns; token++) {
    const trusts = answer.scopes.map(({name}, scope) => `${name} ${percent(picture.weights[scope * picture.tokens + token])}`);
    const label = `Token in ${tokenPlace(picture, token)}${trusts.length ? `: ${trusts.join(', ')}` : ''}`;
    grid.append(make('button', {
      type: 'button', 'data-token': token, 'data-focus': `token${token}`, 'aria-label': label,
      click: () => select({kind: 'token', token}),
      pointerenter: event => event.pointerType === 'mouse' && select({kind: 'token', token}, true),
    }));
  }
  return grid;
}

function walk(event) {
  const columns = Number(event.currentTarget.style.getPropertyValue('--columns'));
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  const cells = [...event.currentTarget.children], next = step && cells[cells.indexOf(event.target) + step];
  if (!step) return;
  event.preventDefault();
  next?.focus();
}

function mapFigure(picture, name, colour, key) {
  const ramp = `background:linear-gradient(90deg, transparent, ${colour || props.fused_colour})`;
  return make('figure', {'data-figure': key}, caption(name, colour),
    make('div', {...framed(picture), ...placing(picture, false)}, canvasOf(picture, `Where the tokens looked, ${name}`)),
    make('div', {class: 'legend', title: 'Share of the attention that a patch got'},
      make('span', {}, '0'), make('i', {style: ramp}), make('span', {class: 'peak'})));
}

function wordStrip(answer) {
  const words = (answer.words || []).map((word, number) => make('button', {
    type: 'button', 'data-word': number, 'data-focus': `word${number}`, click: () => select(wordSelection(number)),
    pointerenter: event => event.pointerType === 'mouse' && !state.timer && select(wordSelection(number), true), pointerleave: unpoint,
    style: `--likely:${Math.round(100 * word.probability)}%`, title: `${percent(word.probability)} likely`,
  }, word.text));
  const start = make('button', {type: 'button', class: 'play', 'data-focus': 'play', ...(answer.words ? {} : {'data-request': ''}), click: () => {
    if (state.timer) return select(ALL);
    if (!answer.words) return request('words', {layer: null, head: null});
    play();
    tellOther({playing: true});
  }}, '▶ Play the words');
  return make('div', {class: 'words', role: 'group', 'aria-label': 'Words of the answer'}, start, ...words);
}
