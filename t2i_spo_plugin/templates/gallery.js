const gallery = document.querySelector(".gallery");
for (const button of document.querySelectorAll(".bar button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".bar button"))
      other.setAttribute("aria-pressed", String(other === button));
    for (const exhibit of gallery.querySelectorAll(".exhibit"))
      exhibit.hidden = button.dataset.kind !== "all" && exhibit.dataset.kind !== button.dataset.kind;
  });
}
const overlays = document.querySelector("#overlays");
if (overlays) {
  const update = () => gallery.classList.toggle("overlays", overlays.checked);
  overlays.addEventListener("change", update);
  update();
}
