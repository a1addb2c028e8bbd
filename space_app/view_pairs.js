// Two scope views that are compared share a selection, and the second shows how the first differs.

function tellOther(detail) {
  if (!props.asks) document.dispatchEvent(new CustomEvent('compared', {detail: {from: element, picture: state.answers[0]?.pictures[state.picture], ...detail}}));
}

function tellMap() {
  const shown = state.answers[state.shown].pictures[state.picture];
  if (shown.scopes) tellOther({map: fusedMap(shown, tokenShares(shown, selected()))});
}

function inGrid([y, x], [rows, columns]) {
  return Math.min(rows - 1, Math.floor(y * rows)) * columns + Math.min(columns - 1, Math.floor(x * columns));
}

function middle([rows, columns], cell) {
  return [(Math.floor(cell / columns) + 0.5) / rows, (cell % columns + 0.5) / columns];
}

// The selection of another view of the same picture, here.
function translated(selection, from) {
  const {token_grid, overview_grid, overview, patch_grid} = state.answers[0].pictures[state.picture];
  if (selection?.kind === 'token') {
    const at = middle(...gridOf(from, selection.token)), seen = overview && selection.token < from.overview;
    return {kind: 'token', token: seen ? inGrid(at, overview_grid) : overview + inGrid(at, token_grid)};
  }
  if (selection?.kind === 'place') return {kind: 'place', patch: inGrid(middle(from.patch_grid, selection.patch), patch_grid)};
  return selection && ALL;
}

document.addEventListener('compared', ({detail: {from, picture, selection, pointed, playing, map}}) => {
  if (props.asks || from === element || !state.answers[0]?.pictures[state.picture]) return;
  if (playing) return state.answers[0].words && !state.timer && play();
  if (map) {
    if (own === 'view-a') return tellMap();  // the second has come, or has changed
    const isNew = !state.other;
    state.other = {map, patch_grid: picture.patch_grid};
    return isNew ? build() : refresh(false);
  }
  if (selection?.kind === 'word' || selection?.kind === 'all' && state.timer) return;  // each plays its own words
  stop();
  if (pointed) state.pointed = translated(selection, picture);
  else Object.assign(state, {pinned: translated(selection, picture), pointed: null});
  refresh();
});
