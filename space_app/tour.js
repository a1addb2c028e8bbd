// Shows the tour's steps, one at a time: by itself at the first visit only.

const tour = element.querySelector('.tour'), begin = element.querySelector('.begin');
const steps = [...tour.querySelectorAll('li')], [back, next, end] = tour.querySelectorAll('button');

function go(number) {
  const open = number >= 0 && number < steps.length;
  tour.hidden = !open;
  begin.hidden = open;
  steps.forEach((step, place) => { step.hidden = place !== number; });  // style.css marks what a step is about
  tour.querySelector('.quiet').textContent = `${number + 1} of ${steps.length}`;
  back.disabled = number === 0;
  next.textContent = number === steps.length - 1 ? 'Done' : 'Next';
  back.onclick = () => go(number - 1);
  next.onclick = () => move(number + 1);
}

function move(number) {
  go(number);
  if (tour.hidden) begin.focus();
}

begin.onclick = () => {
  go(0);
  next.focus();
};
end.onclick = () => move(-1);
tour.addEventListener('keydown', event => { if (event.key === 'Escape') move(-1); });
go(localStorage.getItem('toured') ? -1 : 0);
localStorage.setItem('toured', 'yes');
