// Takes pictures that are dropped or pasted anywhere on the page, or chosen: each is sent, and put into the box if it
// can be used. Every tab has one of these; that of the visible tab acts.

const said = element.querySelector('p'), page = element.closest('.page');

async function send(file) {
  if (file.size > props.most_bytes) throw Error(props.too_large);
  const form = new FormData(), {root} = window.gradio_config;
  form.append('files', file, 'picture.png');
  const answer = await fetch(`${root}/gradio_api/upload?check`, {method: 'POST', body: form})
    .catch(() => { throw Error('The server cannot be reached; please try again.'); });
  if (!answer.ok) throw Error(await answer.text());
  const {refusal, 0: path} = await answer.json();
  if (refusal) throw Error(refusal);
  return {path, url: `${root}/gradio_api/file=${path}`, orig_name: file.name, mime_type: 'image/png', meta: {_type: 'gradio.FileData'}};
}

async function take(files) {
  const count = files.length + page.querySelectorAll('.ask .thumbnail-item').length;
  said.textContent = count > props.most ? props.too_many.replace('{}', count) : 'Sending …';
  if (count > props.most) return;
  const sent = await Promise.allSettled(files.map(send));
  props.value = sent.map(one => one.value).filter(Boolean);
  trigger('sent');
  said.textContent = sent.find(one => one.reason)?.reason.message || '';
}

function stopped(event) {
  event.preventDefault();
  event.stopImmediatePropagation();
  return true;
}

for (const kind of ['dragenter', 'dragover', 'drop', 'paste']) document.addEventListener(kind, event => {
  const data = event.dataTransfer || event.clipboardData;
  if (!page.checkVisibility() || !data.types.includes('Files') || data.types.includes('text/html') && data.getData('text')) return;
  stopped(event);
  if (kind === 'drop' || kind === 'paste') take([...data.files]);
}, true);
page.addEventListener('change', event => {
  if (event.target.matches('.ask [type=file]') && stopped(event)) take([...event.target.files]);
}, true);
