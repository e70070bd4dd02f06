// A page with unsaved edits asks before it is left. Voilà ends the kernel as soon as a page may be left; here it ends
// once the page is left indeed, so that whoever stays keeps the kernel.
(() => {
  if (window.memoirLeaving) return;
  window.memoirLeaving = true;
  const unsaved = () => document.querySelector(".mm-panel .mm-unsaved") !== null;
  const kernel = () => {
    const data = document.getElementById("jupyter-config-data");
    return document.body.dataset.voila && data ? JSON.parse(data.textContent).kernelId : null;
  };
  window.addEventListener("beforeunload", event => {
    if (!unsaved()) return;
    event.preventDefault();
    event.returnValue = "";
    if (kernel()) event.stopImmediatePropagation();
  }, true);
  window.addEventListener("pagehide", () => {
    if (unsaved() && kernel())
      navigator.sendBeacon(`${document.body.dataset.baseUrl}api/shutdown/${kernel()}`, new FormData());
  });
})();
