// Runs before the first paint, so that a dark page never flashes white. A classic script: modules run later.
'use strict'
{
  const KEY = 'pipo:v1:theme'
  const CHOICES = ['system', 'light', 'dark']

  const kept = () => {
    try {
      return localStorage.getItem(KEY)
    } catch {
      return null // storage is switched off: the choice lasts as long as the page
    }
  }
  const apply = (choice) => {
    if (choice === 'system') delete document.documentElement.dataset.theme
    else document.documentElement.dataset.theme = choice
  }
  let choice = CHOICES.includes(kept()) ? kept() : 'system'
  apply(choice)

  window.pipoTheme = {
    get choice() {
      return choice
    },
    next() {
      choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length]
      apply(choice)
      try {
        localStorage.setItem(KEY, choice)
      } catch {
        // as above
      }
      document.dispatchEvent(new Event('themechange'))
      return choice
    },
  }
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    document.dispatchEvent(new Event('themechange'))
  })
}
