// A page with unsaved edits asks before it is left. Voilà ends the kernel and its connection as soon as a page may be
// left, in a listener that runs before any of ours. An error where it calls sendBeacon keeps it from both; the kernel
// ends once the page is left indeed. So whoever stays keeps the kernel.
(() => {
  if (window.memoirLeaving) return;
  window.memoirLeaving = true;
  const unsaved = () => document.querySelector(".mm-panel .mm-unsaved") !== null;
  const send = navigator.sendBeacon.bind(navigator);
  let held = null;
  navigator.sendBeacon = (url, data) => {
    if (!unsaved() || !String(url).includes("voila/api/shutdown/")) return send(url, data);
    held = [url, data];
    throw new Error("unsaved edits: the kernel ends once the page is left");
  };
  window.addEventListener("beforeunload", event => {
    if (!unsaved()) return;
    event.preventDefault();
    event.returnValue = "";
  });
  window.addEventListener("pagehide", () => held && send(...held));
})();
