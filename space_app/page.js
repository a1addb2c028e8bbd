// What Gradio's page lacks: names for screen readers, texts copied as they are, and what was typed when it is loaded anew.
// Runs once. `talk` moves questions between box and chat at once, whatever the server does.

const ANSWERING = {__type__: 'update', submit_btn: false, stop_btn: true}, READY = {__type__: 'update', submit_btn: true, stop_btn: false};

const asHtml = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
const asText = html => html.replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&');

window.talk = {
  answering: () => ANSWERING,
  ready: () => READY,
  ask: (box, history) => {
    const pictures = box.files.map(file => ({type: 'file', file, alt_text: 'The picture asked about'}));
    const question = {role: 'user', metadata: null, options: null, content: [...pictures, {type: 'text', text: asHtml(box.text)}]};
    return [[...history, question], {...ANSWERING, value: {text: '', files: []}}];
  },
  // Before what has been typed meanwhile.
  takeBack: (history, box) => {
    const place = history.findLastIndex(turn => turn.role === 'user'), parts = history[place].content;
    const text = asText(parts.map(part => part.text || '').join('')), files = parts.map(part => part.file).filter(Boolean);
    const value = {text: [text, box.text].filter(Boolean).join('\n'), files: [...files, ...box.files]};
    return [history.slice(0, place), {...READY, value}];
  },
  // Refused, stopped or broken off: an answer keeps what it has, and a question without one goes back.
  end: (history, box) => history.at(-1)?.role === 'user' ? window.talk.takeBack(history, box) : [history, READY],
};

// What the page opens with comes before what is asked.
window.talk.begun = new Promise(begin => { window.talk.opened = () => { begin(); return []; }; });

function name() {
  document.querySelectorAll('.ask textarea').forEach(box => box.setAttribute('aria-label', 'Your question'));
  document.querySelectorAll('.ask .stop-button').forEach(button => button.setAttribute('aria-label', 'Stop'));
  document.querySelectorAll('.ask [role="listitem"]').forEach(item => { item.role = 'group'; });  // of no list
  document.querySelectorAll('#chat [aria-label="Undo"]').forEach(button => { button.ariaLabel = button.title = 'Edit the question'; });
  document.querySelectorAll('#chat img[alt=""]').forEach(image => { image.alt = 'The picture asked about'; });
  document.querySelectorAll('#chat :is([data-testid="user"], [data-testid="bot"])').forEach(turn => turn.removeAttribute('aria-label'));  // HTML
}
new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
name();

// Gradio would copy the HTML.
document.addEventListener('click', event => {
  const button = event.target.closest('#chat [aria-label="Copy message"]'), before = Node.DOCUMENT_POSITION_PRECEDING;
  if (!button) return;
  event.stopImmediatePropagation();
  const texts = [...document.querySelectorAll('#chat .message-content .md')].filter(text => !text.closest('.bot .message ~ .message'));  // not notes
  getSelection().selectAllChildren(texts.findLast(text => button.compareDocumentPosition(text) & before));
  document.execCommand('copy');
  setTimeout(() => getSelection().removeAllRanges(), 600);  // what was copied is seen
}, true);
// While an answer is written, Enter asks nothing.
document.addEventListener('keypress', event => {
  if (event.key !== 'Enter' || event.shiftKey || !event.target.closest('.ask')?.querySelector('.stop-button')) return;
  event.preventDefault();
  event.stopImmediatePropagation();
}, true);

const say = sentence => document.querySelectorAll('.intake p').forEach(said => { said.textContent = sentence; });

// Gradio notices only at the next question that the server has ended. One that was started anew knows nothing of this page.
const LOST = 'The server cannot be reached; what you have typed stays here.';
let lost = false;
setInterval(async () => {
  if (document.hidden) return;
  const {root, app_id} = window.gradio_config, answer = await fetch(`${root}/gradio_api/app_id`).catch(() => null);
  if (answer?.ok && (await answer.json()).app_id !== app_id) location.reload();
  if (lost !== !answer?.ok) say(answer?.ok ? '' : LOST);
  lost = !answer?.ok;
}, 5000);
let talked = false;
new MutationObserver(() => { talked ||= Boolean(document.querySelector('#ask .stop-button')); }).observe(document.body, {childList: true, subtree: true});
const boxes = () => [...document.querySelectorAll('.ask textarea')];
window.addEventListener('pagehide', () => {
  const typed = boxes().map(box => box.value);
  if (talked || typed.some(Boolean)) sessionStorage.setItem('before', JSON.stringify(typed));
});
const before = JSON.parse(sessionStorage.getItem('before') || 'null');
sessionStorage.removeItem('before');
if (before) {
  boxes().forEach((box, number) => {
    box.value = before[number] || '';
    box.dispatchEvent(new Event('input', {bubbles: true}));
  });
  say('The page was loaded anew, and the conversation has ended; what you had typed is here, pictures please add again.');
}
