// The share of right answers by number of visual tokens, with the chosen number marked: HTML, from numbers alone.

function curveOf(scores, count) {
  const percent = share => (100 * share).toFixed(1), side = row => Math.sqrt(row.visual_tokens);  // even steps, as on the slider
  const lowest = Math.min(...scores.map(row => row.low)), highest = Math.max(...scores.map(row => row.high));
  const first = side(scores[0]), last = side(scores.at(-1));
  const x = row => 40 + 250 * (side(row) - first) / (last - first || 1), y = share => 8 + 44 * (highest - share) / (highest - lowest || 1);
  const points = (rows, share) => rows.map(row => `${x(row).toFixed(1)},${y(share(row)).toFixed(1)}`).join(' ');
  const away = row => Math.abs(row.visual_tokens - count);
  const chosen = scores.reduce((best, row) => away(row) < away(best) ? row : best);
  const tokens = `${chosen.visual_tokens} ${chosen.visual_tokens === 1 ? 'token' : 'tokens'}`;
  const at = away(chosen) ? `At ${tokens}, the nearest number measured` : `At ${tokens}`;
  const all = scores.map(row => `${row.visual_tokens}: ${percent(row.mean)}%`).join(', ');
  return `<svg viewBox="0 0 300 70" role="img" aria-label="Right answers by number of visual tokens: ${all}">
    <title>Right answers by number of visual tokens, with 95% intervals</title>
    <polygon points="${points(scores, row => row.high)} ${points([...scores].reverse(), row => row.low)}"/>
    <polyline points="${points(scores, row => row.mean)}"/>
    <circle cx="${x(chosen)}" cy="${y(chosen.mean)}" r="4"/>
    <text x="36" y="12" text-anchor="end">${percent(highest)}%</text><text x="36" y="55" text-anchor="end">${percent(lowest)}%</text>
    <text x="40" y="67">${scores[0].visual_tokens}</text><text x="290" y="67" text-anchor="end">${scores.at(-1).visual_tokens} tokens</text>
  </svg><p>${at}: ${percent(chosen.mean)}% of the questions of its test (${percent(chosen.low)} to ${percent(chosen.high)})</p>`;
}
